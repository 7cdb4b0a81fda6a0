import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.parts import Part, merge_parts
from prefgen.data.reader import ShardReader
from prefgen.errors import CheckpointError, ConfigError, DataError
from prefgen.models.image_encoder import ImageEncoder
from prefgen.models.lora import add_lora, load_lora, save_lora
from prefgen.models.mllm import MLLM
from prefgen.models.pooling import POOLINGS, pooled_states
from prefgen.models.probes import read_choice
from prefgen.models.representation import embed_history, like_probability, list_attributes
from prefgen.run import fit, use
from prefgen.run_noise import quiet_lightning
from prefgen.schema import image_key
from prefgen.stages.features import user_images
from prefgen.stages.probe.config import Pooling
from prefgen.stages.probe.data import ProbeData
from prefgen.stages.probe.module import ProbeModule
from prefgen.testing.resume import assert_resume_is_exact

GOLDEN = Path(__file__).parents[2] / "golden" / "probe.json"


class _Losses(Callback):
    def __init__(self):
        self.values = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.values.append(float(loss.detach()))


def train(config, *callbacks):
    with quiet_lightning():
        return fit(
            config,
            make_module=lambda: ProbeModule(config),
            make_data=lambda: ProbeData(config),
            extra_callbacks=callbacks,
        )


@pytest.fixture(scope="module")
def finished(probe_config, tmp_path_factory):
    """A trained run that has also written embeddings."""
    run_dir = tmp_path_factory.mktemp("probe") / "run"
    config = probe_config(run_dir, "trainer.max_steps=60", "optim.learning_rate=1e-2")
    train(config)
    with quiet_lightning():
        use(config, verb="predict", module=ProbeModule(config), data=ProbeData(config))
    return config, run_dir


@pytest.mark.parametrize("num_workers", [0, 2])
def test_three_and_three_steps_are_six(probe_config, tmp_path, num_workers):
    assert_resume_is_exact(
        probe_config(tmp_path / "unused"),
        make_module=ProbeModule,
        make_data=ProbeData,
        tmp_path=tmp_path,
        num_workers=num_workers,
    )


def test_five_losses(probe_config, tmp_path):
    losses = _Losses()
    train(probe_config(tmp_path / "run", "trainer.max_steps=5", "optim.learning_rate=1e-2"), losses)
    assert losses.values == pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=1e-4)


def test_the_poolings_of_the_config_are_those_of_the_models():
    assert get_args(Pooling) == POOLINGS


def test_report_names_each_cell_the_choice_and_its_rule(finished):
    _, run_dir = finished
    report = json.loads((run_dir / "probe.json").read_text())
    for task, classes in (("inter", 6), ("intra", 2)):
        grid = report["tasks"][task]
        assert grid["chance"] == 1 / classes
        cells = [(cell["layer"], cell["pooling"]) for cell in grid["cells"]]
        assert cells == [(layer, pooling) for layer in range(1, 5) for pooling in POOLINGS]
        assert all(cell["low"] <= cell["accuracy"] <= cell["high"] for cell in grid["cells"])
        assert all(cell["num_samples"] > 0 for cell in grid["cells"])
    assert report["rule"] == "rule"
    assert "inter-user" in report["rule_words"]
    assert read_choice(run_dir / "probe.json").core_layer >= 2
    assert set(report["lineage"]) == {"mllm", "lora", "probe"}
    # Users of the tiny world differ in hue, which even a random model shows; shuffled labels show nothing.
    inter = report["tasks"]["inter"]
    assert max(cell["accuracy"] for cell in inter["cells"]) > 2 * inter["chance"]
    assert inter["control"]["mean"] < 2 * inter["chance"]


def test_heat_maps_are_pictures(finished):
    _, run_dir = finished
    for task in ("inter", "intra"):
        with Image.open(run_dir / f"{task}_user.png") as image:
            assert image.size[0] > 300


def test_every_classifier_and_a_target_beside(probe_config, tmp_path):
    """The first classifier named chooses; the inter-user task is read a second time, behind a target."""
    run_dir = tmp_path / "run"
    words = [
        "probe.classifiers=[ridge,adamw,logistic]",
        "data.inter_target=true",
        "trainer.max_steps=3",
        "probe.num_resamples=10",
        "probe.l2=0.5",  # the logistic ones converge in a tenth of the steps
    ]
    config = probe_config(run_dir, *words)
    module = ProbeModule(config)
    with quiet_lightning():
        fit(config, make_module=lambda: module, make_data=lambda: ProbeData(config))
    plain, target = (module.states[name] for name in ("inter", "inter_target"))
    assert plain.train.shape == target.train.shape == (36, 16, module.mllm.hidden_size)
    assert torch.equal(plain.labels, target.labels)
    assert not torch.isclose(plain.train, target.train).all(-1).any(), "each is read at its own question"
    report = json.loads((run_dir / "probe.json").read_text())
    assert list(report["tasks"]) == ["inter", "intra", "inter_target"]
    for task, grid in report["tasks"].items():
        assert grid["classifier"] == "ridge"
        assert list(grid["other_classifiers"]) == ["adamw", "logistic"]
        assert all(len(cells) == 16 for cells in (grid["cells"], *grid["other_classifiers"].values()))
        assert (run_dir / f"{task}_user.png").is_file()
    for task in ("inter", "inter_target"):
        grid = report["tasks"][task]
        for cells in (grid["cells"], grid["other_classifiers"]["logistic"]):
            assert max(cell["accuracy"] for cell in cells) > 2 * grid["chance"]
        assert grid["control"]["mean"] < 2 * grid["chance"]
    inter = report["tasks"]["inter"]["cells"]
    best = max(cell["accuracy"] for cell in inter if cell["layer"] >= 2)
    core = report["choice"]["core"]
    assert best in [
        c["accuracy"] for c in inter if (c["layer"], c["pooling"]) == (core["layer"], core["pooling"])
    ]


def test_a_test_run_measures_users_of_no_training(finished):
    config, run_dir = finished
    with quiet_lightning():
        metrics = use(config, verb="test", module=ProbeModule(config), data=ProbeData(config)).metrics
    report = json.loads((run_dir / "test.json").read_text())
    assert (report["num_users"], report["num_left_out"], report["num_histories"]) == (6, 0, 4)
    assert (report["mean_references"], report["mean_targets"]) == (2, 2)
    for part in ("core", "sem"):
        found = report["parts"][part]
        for place in ("question", "target", "targets"):
            assert list(found[place]["identification"]) == ["1", "2", "3"]
            for by_size in found[place]["identification"].values():
                assert list(by_size) == ["2", "4", "6"]
                assert all(one["low"] <= one["mean"] <= one["high"] for one in by_size.values())
            cosines = found[place]["cosines"]
            assert cosines["gap"]["mean"] == pytest.approx(
                cosines["within"]["mean"] - cosines["between"]["mean"]
            )
            assert 0 <= found[place]["likes"]["mean"] <= 1
        assert set(found["other_targets"]) == {"within", "between", "gap"}
        assert set(found["verdict"]) == {"same", "different", "gap"}
    core = report["parts"]["core"]["question"]
    assert metrics["test/identification_core"] == pytest.approx(core["identification"]["3"]["6"]["mean"])
    assert core["identification"]["3"]["2"]["mean"] > 0.6, "hues show in a random model too"
    assert report["choice"] == json.loads((run_dir / "probe.json").read_text())["choice"]
    assert (run_dir / "identification.png").is_file()


def test_too_few_images_to_test_on_are_refused(finished):
    config, _ = finished
    config = replace(config, data=replace(config.data, test_histories=9))
    with (
        quiet_lightning(),
        pytest.raises(DataError, match="0 of 6 have so many; lower data.test_histories=9"),
    ):
        use(config, verb="test", module=ProbeModule(config), data=ProbeData(config))


def test_checkpoint_holds_probes_only(finished):
    _, run_dir = finished
    (path,) = (run_dir / "checkpoints").glob("step-00000060.ckpt")
    content = torch.load(path, weights_only=True)
    assert all(name.startswith("grids.") for name in content["state_dict"])


@pytest.mark.slow
def test_parts_of_a_prediction_make_the_whole(finished, monkeypatch):
    """As ranks write them: the same tar files and index as one process."""
    config, _ = finished
    monkeypatch.setattr("prefgen.stages.probe.embed.USERS_PER_SHARD", 4)
    sets = []
    for count in (1, 3):
        mine = replace(
            config, embed=replace(config.embed, out=f"{config.embed.out}-{count}-parts", users_per_pass=4)
        )
        module = ProbeModule(mine).eval()
        for number in range(count):
            with torch.inference_mode():
                out = module.predict(None, part=Part(number=number, count=count))
        if count > 1:
            merge_parts(out, count=count)
        sets.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(sets[0]) == 3 + 2 + 2 + 1  # 12, 6 and 6 users, and the index
    assert sets[0] == sets[1]


def test_layers_by_hand_and_no_disliked_references_from_fit_to_embeddings(probe_config, inputs, tmp_path):
    hand = ("probe.choice=by_hand", "probe.sem_layers=[4,1,2]", "probe.sem_pooling=max", "probe.core_layer=1")
    config = probe_config(tmp_path / "run", *hand, "data.sides=liked")
    train(config)
    report = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert report["choice"]["sem"] == {"layers": [1, 2, 4], "pooling": "max"}
    assert report["choice"]["core"]["layer"] == 1
    assert report["rule"] == "by_hand"
    assert report["rule_words"].startswith("by hand: sem layers 4, 1, 2; sem pooling max; core layer 1;")
    with quiet_lightning():
        use(config, verb="predict", module=ProbeModule(config), data=ProbeData(config))
    reader = EmbeddingReader(config.embed.out, split="test")
    assert reader.header["sides"] == ["liked"]
    user, mllm = reader[0], MLLM.load(inputs / "mllm")
    assert user.sem.shape == (3, 3 * mllm.hidden_size)
    assert user.liked_attributes
    for position in range(len(reader)):
        keys = [key for draw in reader[position].reference_keys for key in draw]
        assert keys
        assert not any("/disliked." in key for key in keys)
    # the profile of the liked images alone, and its negative twin of the same images disliked
    sample = ShardReader(inputs / "shards", split="test")[0]
    pictures = dict(zip(user.image_keys, user_images(sample), strict=True))
    load_lora(mllm, path=inputs / "lora")
    liked, choice = (
        [pictures[key] for key in user.reference_keys[0]],
        read_choice(tmp_path / "run/probe.json"),
    )
    own = embed_history(mllm, liked=liked, disliked=[], choice=choice)
    twin = embed_history(mllm, liked=[], disliked=liked, choice=choice)
    np.testing.assert_allclose(user.sem[0], own.sem[0], atol=5e-3)
    np.testing.assert_allclose(user.core_negative[0], twin.core[0], atol=5e-3)


def test_embeddings_are_what_embed_history_gives(finished, inputs):
    config, run_dir = finished
    reader = EmbeddingReader(config.embed.out, split="test")
    assert set(reader.header) >= {"mllm", "lora", "probe", "image_encoder"}
    user = reader[0]
    sample = ShardReader(inputs / "shards", split="test")[0]
    pictures = dict(zip(user.image_keys, user_images(sample), strict=True))
    mllm = MLLM.load(inputs / "mllm")
    load_lora(mllm, path=inputs / "lora")
    choice = read_choice(run_dir / "probe.json")
    assert user.core.shape == (3, mllm.hidden_size)
    assert user.sem.shape == (3, 4 * mllm.hidden_size)
    for draw, keys in enumerate(user.reference_keys):
        liked = [pictures[key] for key in keys if "/liked." in key]
        disliked = [pictures[key] for key in keys if "/disliked." in key]
        own = embed_history(mllm, liked=liked, disliked=disliked, choice=choice)
        twin = embed_history(mllm, liked=disliked, disliked=liked, choice=choice)
        # the cache holds image features in half precision
        for name, states in (("", own), ("_negative", twin)):
            np.testing.assert_allclose(getattr(user, f"core{name}")[draw], states.core[0], atol=5e-3)
            np.testing.assert_allclose(getattr(user, f"sem{name}")[draw], states.sem[0], atol=5e-3)
    encoder = ImageEncoder.load(inputs / "pipeline" / "image_encoder")
    np.testing.assert_allclose(user.image, encoder.embed(list(pictures.values())), atol=1e-5)
    assert user.prompts == tuple(one.prompt for one in (*sample.history.liked, *sample.history.disliked))
    assert user.liked_attributes == sample.history.liked_attributes


def test_training_users_bring_their_liked_images_alone(finished, inputs):
    config, _ = finished
    reader = EmbeddingReader(config.embed.out, split="train")
    sample = ShardReader(inputs / "shards", split="train")[0]
    user, liked = reader[0], len(sample.liked)
    assert user.image_keys == tuple(image_key(user.user_id, "liked", i) for i in range(liked))
    assert user.prompts == tuple(one.prompt for one in sample.history.liked)
    encoder = ImageEncoder.load(inputs / "pipeline" / "image_encoder")
    np.testing.assert_allclose(user.image, encoder.embed(user_images(sample)[:liked]), atol=1e-5)
    # references of both sides all the same
    assert any("/disliked." in key for draw in user.reference_keys for key in draw)


def test_the_last_draws_are_what_a_new_user_begins_with(finished):
    """Of three draws the last is sparse; full ones come first, because that one is measured with."""
    config, _ = finished
    full, sparse = [], []
    for split in ("train", "validation", "test"):
        reader = EmbeddingReader(config.embed.out, split=split)
        for position in range(len(reader)):
            for draw, keys in enumerate(reader[position].reference_keys):
                counts = tuple(sum(f"/{side}." in key for key in keys) for side in ("liked", "disliked"))
                (full if draw < 2 else sparse).append(counts)
    assert set(full) == {(4, 4)}
    assert {liked for liked, _ in sparse} == {1, 2, 3, 4}
    assert 0.25 < sum(disliked == 0 for _, disliked in sparse) / len(sparse) < 0.75


def test_hidden_states_too_large_to_keep_are_refused(probe_config, tmp_path, monkeypatch):
    from prefgen.stages.probe import module

    def large(mllm, **rest):
        return pooled_states(mllm, **rest) * 1e6

    monkeypatch.setattr(module, "pooled_states", large)
    with pytest.raises(DataError, match="overflow float16"):
        train(probe_config(tmp_path / "run"))


def test_a_choice_of_layers_is_not_carried_to_another_lora(finished, inputs, tmp_path):
    """A LoRA trained anew at the same place leaves the run finished, and its layers chosen on the old one."""
    config, run_dir = finished
    (tmp_path / "run").symlink_to(run_dir)
    torch.manual_seed(7)
    mllm = MLLM.load(inputs / "mllm")
    save_lora(add_lora(mllm, rank=2), path=tmp_path / "lora")
    config = replace(
        config, run_dir=str(tmp_path / "run"), model=replace(config.model, lora=str(tmp_path / "lora"))
    )
    with pytest.raises(CheckpointError, match="made with another lora .* fit --stage probe' again"):
        use(config, verb="predict", module=ProbeModule(config), data=ProbeData(config))


def test_each_draw_leaves_targets_of_the_liked_side(finished):
    config, _ = finished
    for split in ("train", "validation", "test"):
        reader = EmbeddingReader(config.embed.out, split=split)
        for position in range(len(reader)):
            user = reader[position]
            assert all(len(user.rows_outside(draw)) >= 2 for draw in range(3))


def test_words_and_scores_from_pictures(inputs):
    mllm = MLLM.load(inputs / "mllm")
    pictures = [Image.new("RGB", (40, 40), color) for color in ("red", "blue", "green")]
    said = list_attributes(mllm, liked=pictures[:1], disliked=[], kind="likes", max_new_tokens=4)
    assert isinstance(said, tuple)
    scores = like_probability(mllm, liked=pictures[:1], disliked=pictures[1:2], candidates=pictures)
    assert scores.shape == (3,)
    assert ((scores > 0) & (scores < 1)).all()


def test_refusals(probe_config, tmp_path):
    with pytest.raises(ConfigError, match="gradient_clip_val=null"):
        probe_config(tmp_path, "trainer.gradient_clip_val=1.0")
    with pytest.raises(ConfigError, match="probe.core_layer: given by hand, but probe.choice=rule"):
        probe_config(tmp_path, "probe.core_layer=2")
    with pytest.raises(ConfigError, match="by_hand, but none of probe.sem_layers, .* is given"):
        probe_config(tmp_path, "probe.choice=by_hand")
    with pytest.raises(ConfigError, match="names a layer twice"):
        probe_config(tmp_path, "probe.choice=by_hand", "probe.sem_layers=[2,2]")
    with pytest.raises(ConfigError, match="'median' is not one of last, image_mean, mean, max"):
        probe_config(tmp_path, "probe.choice=by_hand", "probe.sem_pooling=median")
    with pytest.raises(ConfigError, match="no layer 5; the MLLM has 4"):  # before anything is read
        ProbeModule(probe_config(tmp_path, "probe.choice=by_hand", "probe.sem_layers=[4,5]"))
    for words, message in (
        ("probe.classifiers=[svm]", r"probe.classifiers=\[svm\] must name one or more of adamw, ridge"),
        ("probe.classifiers=[ridge,ridge]", "each once"),
        ("probe.l2=0", "probe.l2=0.0 must be above 0"),
        ("data.test_histories=1", "data.test_histories=1 must be at least 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            probe_config(tmp_path, words)
    module = ProbeModule(probe_config(tmp_path))
    with pytest.raises(CheckpointError, match="fit --stage probe"):
        module.predict(None)
