"""A tiny workdir in which every stage seems to have been fitted: what ``prefgen evaluate`` reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from prefgen.evaluate.judges import Judge
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.user_adapter import UserAdapter, load_user_adapter, save_user_adapter
from prefgen.testing.artefacts import save_tiny_artefacts
from prefgen.testing.data import HUES, SUBJECTS, make_embeddings, make_shards
from prefgen.testing.diffusion import TINY_IMAGE_DIM

CORE_WIDTH = 48
"""Hidden size of the tiny MLLM."""


def save_tiny_workdir(folder: Path, *, num_users: int = 16, num_images: int = 12, seed: int = 0) -> Path:
    """Shards, embeddings, artefacts, metrics and ``models/`` (pipeline, mllm, judge.safetensors).

    A quarter of the users are test users. Everything is random; the judge too.
    """
    models = save_tiny_artefacts(folder / "models", seed=seed)
    make_shards(folder, num_users=num_users, num_liked=num_images, num_disliked=num_images, seed=seed)
    for stage, name in (("vqa", "lora"), ("probe", "probe.json"), ("align", "projector.safetensors")):
        (folder / stage).mkdir()
        shutil.move(models / name, folder / stage / name)
    (folder / "inject").mkdir()
    shutil.move(models / "user_adapter.safetensors", folder / "inject" / "user_adapter.safetensors")
    record = json.loads((folder / "probe" / "probe.json").read_text())
    make_embeddings(
        folder / "embeddings",
        num_users=num_users,
        num_images=num_images,
        core_dim=CORE_WIDTH,
        sem_dim=4 * CORE_WIDTH,
        image_dim=TINY_IMAGE_DIM,
        header=record["lineage"],
        seed=seed,
    )
    _save_image_only(folder, pipeline=models / "pipeline", seed=seed)
    _write_records(folder, probe=record)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(groups={"palette": HUES}, subjects=tuple(sorted(f"a {name}" for name in SUBJECTS)))
    judge.eval().save(models / "judge.safetensors")
    return folder


def _save_image_only(folder: Path, *, pipeline: Path, seed: int) -> None:
    bundle = DiffusionBundle.load(str(pipeline))
    own = load_user_adapter(folder / "inject" / "user_adapter.safetensors", unet=bundle.unet)
    shape = FusionShape(parts=("image",) * 3, widths=(TINY_IMAGE_DIM,) * 3, cross_width=bundle.cross_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        adapter = UserAdapter(bundle.unet, shape=shape)
        for parameter in adapter.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    lineage = {name: value for name, value in own.lineage.items() if name != "projector"}
    save_user_adapter(
        adapter, path=folder / "inject_image_only" / "user_adapter.safetensors", lineage=lineage
    )


def _write_records(folder: Path, *, probe: dict[str, object]) -> None:
    """metrics.json of every run but align_independent, and a probe.json with both tasks."""
    cells = [
        {"layer": layer, "pooling": name, "accuracy": 0.6, "low": 0.55, "high": 0.65, "num_samples": 40}
        for layer in range(1, 5)
        for name in ("last", "image_mean", "mean", "max")
    ]
    control = {"mean": 0.26, "low": 0.2, "high": 0.3, "chance": 0.25}
    task = {"chance": 0.25, "num_users": 4, "cells": cells, "control": control}
    record = {**probe, "tasks": {"inter": task, "intra": task}, "rule_words": "core: the best cell; sem: too"}
    (folder / "probe" / "probe.json").write_text(json.dumps(record), encoding="utf-8")
    for name in ("inter", "intra"):
        Image.new("RGB", (40, 30), (90, 120, 200)).save(folder / "probe" / f"{name}_user.png")
    after = {"val/mmd2": 0.01, "val/chance_1": 0.05, "val/chance_10": 0.5}
    for name in ("recall", "permuted_recall"):
        for depth in ("1", "10"):
            after |= {f"val/{name}_{depth}{end}": 0.4 for end in ("", "_low", "_high")}
    for stage in ("vqa", "probe", "align", "inject", "inject_image_only"):
        figures = {"steps": 7, "epochs": 1, "before": {"val/mmd2": 0.2}, "fit": after}
        (folder / stage / "metrics.json").write_text(json.dumps(figures), encoding="utf-8")
