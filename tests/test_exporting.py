"""Export: a folder that draws our pictures without prefgen, and says what it is."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prefgen.artefacts import Artefacts
from prefgen.cli import main
from prefgen.exporting import export_for_diffusers
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.text_lora import add_text_lora, save_text_lora
from prefgen.pipeline import PrefGenPipeline
from prefgen.profile import UserProfile
from prefgen.testing.artefacts import random_profile, save_tiny_artefacts
from prefgen.testing.data import make_shards

HOW = {"user_scale": 0.9, "seed": 5, "num_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_artefacts(tmp_path_factory.mktemp("artefacts") / "tiny")


@pytest.fixture(scope="module")
def profile(folder):
    path = folder / "me.safetensors"
    random_profile(folder, seed=3).save(path)
    return path


def models(folder):
    return [
        "--artefacts",
        str(folder),
        "--pipeline",
        str(folder / "pipeline"),
        "--mllm",
        str(folder / "mllm"),
    ]


@pytest.fixture(scope="module")
def exported(folder, profile, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "adapter"
    words = ["export", "--format", "ip-adapter", "--out", str(out), "--profile", str(profile)]
    assert main([*words, *models(folder)]) == 0
    return out


def run_script(exported, *, folder, profile, out, patch):
    """What ``draw.py`` draws with the settings of ``HOW``."""
    spec = importlib.util.spec_from_file_location("draw", exported / "draw.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ["draw.py", "--pipeline", str(folder / "pipeline"), "--profile", str(profile), "--out", str(out)]
    words += ["--prompt", "a red fox", "--user-scale", "0.9", "--seed", "5", "--steps", "4"]
    patch.setattr(sys, "argv", [*words, "--guidance-scale", "3"])
    script.main()
    return out


def test_the_script_draws_our_picture_without_prefgen(folder, profile, exported, tmp_path, monkeypatch):
    pipeline = PrefGenPipeline.load(folder, pipeline=folder / "pipeline", mllm=str(folder / "mllm"))
    mine = UserProfile.load(profile)
    ours = pipeline.generate("a red fox", profile=mine, **HOW)[0]
    base = pipeline.generate("a red fox", profile=mine, **{**HOW, "user_scale": 0.0})[0]
    text = (exported / "draw.py").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if "import" in line.split()[:1] and "prefgen" in line]
    out = run_script(exported, folder=folder, profile=profile, out=tmp_path / "fox.png", patch=monkeypatch)
    with Image.open(out) as picture:
        theirs = np.asarray(picture)
    assert np.array_equal(theirs, np.asarray(ours))
    assert not np.array_equal(theirs, np.asarray(base))
    embeds = pipeline.ip_adapter_image_embeds(mine)[0]
    written = load_file(exported / "me.embeds.safetensors")["ip_adapter_image_embeds"]
    torch.testing.assert_close(written, embeds, rtol=0, atol=1e-5, msg="matrix products may round anew")
    assert torch.equal(pipeline.ip_adapter_image_embeds(mine, guided=False)[0], embeds[1:])


def test_a_text_lora_goes_along(folder, profile, tmp_path, monkeypatch):
    """With users the same picture without prefgen; without them the base model, bit for bit."""
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    bundle = DiffusionBundle.load(str(folder / "pipeline"))
    add_text_lora(bundle.unet, rank=2)
    for name, parameter in bundle.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_text_lora(bundle.unet, path=trained / "text_lora.safetensors")
    mine = UserProfile.load(profile)
    plain, with_lora = (
        PrefGenPipeline.load(place, pipeline=folder / "pipeline") for place in (folder, trained)
    )
    ours = with_lora.generate("a red fox", profile=mine, **HOW)[0]
    assert not np.array_equal(ours, plain.generate("a red fox", profile=mine, **HOW)[0])
    base = {**HOW, "user_scale": 0.0}
    assert np.array_equal(
        with_lora.generate("a red fox", profile=mine, **base)[0],
        plain.generate("a red fox", profile=mine, **base)[0],
    )
    places = Artefacts.find(trained, pipeline=folder / "pipeline")
    out = export_for_diffusers(places, out=tmp_path / "out").adapter.parent
    drawn = run_script(out, folder=folder, profile=profile, out=tmp_path / "fox.png", patch=monkeypatch)
    with Image.open(drawn) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(ours))


def test_the_export_draws_here_too(folder, profile, exported):
    """``--adapter FILE``: projector and statistics come from the file."""
    how = {"seed": 5, "num_steps": 2, "guidance_scale": 3.0}
    mine = UserProfile.load(profile)
    pictures = []
    for adapter in (None, exported / "ip_adapter.safetensors"):
        pipeline = PrefGenPipeline.load(folder, pipeline=folder / "pipeline", adapter=adapter)
        pictures.append(np.asarray(pipeline.generate("a red fox", profile=mine, **how)[0]))
    assert np.array_equal(*pictures)


def test_the_card_says_what_it_was_trained_on(folder, tmp_path, exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "base_model: pipeline" in card
    assert "not at hand" in card
    assert str(folder) not in card, "a card names no path of this machine"
    work = tmp_path / "work"
    (work / "inject").mkdir(parents=True)
    (work / "align").mkdir()
    (work / "inject" / "user_adapter.safetensors").write_bytes(
        (folder / "user_adapter.safetensors").read_bytes()
    )
    (work / "align" / "projector.safetensors").write_bytes((folder / "projector.safetensors").read_bytes())
    shards = make_shards(work, num_users=4)
    (work / "raw" / "import.json").write_text('{"source": "folder", "licence": "CC0"}', encoding="utf-8")
    config = f"seed: 7\ndata: {{shards: {shards}, batch_size: 9}}\nmodel: {{pipeline: some/where/base-x}}\n"
    (work / "inject" / "config.yaml").write_text(config, encoding="utf-8")
    metrics = {"before": {"val/loss": 0.5}, "fit": {"val/loss": 0.25, "train/loss": 0.1}}
    (work / "inject" / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    out = tmp_path / "out"
    assert main(["export", "--format", "ip-adapter", "--out", str(out), "--artefacts", str(work)]) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    for words in (
        "base_model: base-x",
        "train: 2 users, 10 liked and 8 disliked images",
        "licence of the histories: CC0",
        "| data.batch_size | 9 |",
        "| val/loss | 0.5 | 0.25 |  |",
    ):
        assert words in card
    assert "train/loss" not in card


def test_mistakes_are_answered_in_one_line(folder, profile, exported, tmp_path, capsys):
    def fails(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    capsys.readouterr()
    start = ["export", "--format", "ip-adapter"]
    assert "is not an empty folder" in fails(*start, "--out", exported, *models(folder))
    new = tmp_path / "new"
    twice = ["--profile", profile, "--profile", profile]
    assert "one name: me, me" in fails(*start, "--out", new, *twice, *models(folder))
    assert "no user adapter at" in fails(*start, "--out", new, "--artefacts", tmp_path)
    other = UserProfile.load(profile)
    object.__setattr__(other, "lineage", {"mllm": "f" * 64})
    other.save(tmp_path / "other.safetensors")
    refused = fails(*start, "--out", new, "--profile", tmp_path / "other.safetensors", *models(folder))
    assert "was made by another mllm" in refused
    assert not new.exists(), "nothing is written before everything is checked"
