"""A complete set of tiny untrained artefacts of the real classes: what building profiles and drawing need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prefgen.lineage import hash_file, hash_folder, hash_json
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.lora import add_lora, save_lora
from prefgen.models.mllm import MLLM
from prefgen.models.probes import LayerChoice, choice_to_json
from prefgen.models.projector import ProjectorShape, SemProjector, load_projector, save_projector
from prefgen.models.readout import fit_readout, save_readout
from prefgen.models.user_adapter import KIND as ADAPTER_KIND
from prefgen.models.user_adapter import UserAdapter, save_user_adapter
from prefgen.profile import PROFILE_PARTS, TENSORS, ProfileCounts, UserProfile
from prefgen.testing.data import HUES
from prefgen.testing.diffusion import TINY_IMAGE_DIM, TINY_TEXT_DIM, save_tiny_pipeline
from prefgen.testing.mllm import tiny_mllm


def save_tiny_artefacts(folder: Path, *, seed: int = 0) -> Path:
    """Write ``pipeline/``, ``mllm/`` and, in the layout of a shipped folder, everything trained on them.

    LoRA, projector, readout and adapter hold random numbers, so every part changes what comes out.

    Args:
        folder: where to write.
        seed: of all weights; the global random state is left as it was.

    Returns:
        ``folder``.
    """
    save_tiny_pipeline(folder / "pipeline", seed=seed)
    tiny_mllm(folder / "mllm", seed=seed)
    choice = LayerChoice(sem_layers=(1, 2, 3, 4), sem_pooling="last", core_layer=3, core_pooling="mean")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = _save_random_lora(folder)
        lineage = {
            "mllm": hash_folder(folder / "mllm"),
            "lora": hash_folder(folder / "lora"),
            "probe": hash_json(choice_to_json(choice)),
            "image_encoder": hash_folder(folder / "pipeline" / "image_encoder"),
            "text_encoder": hash_folder(folder / "pipeline" / "text_encoder"),
        }
        record = {"lineage": lineage, "choice": choice_to_json(choice)}
        (folder / "probe.json").write_text(json.dumps(record), encoding="utf-8")
        sem_width = width * len(choice.sem_layers)
        projector = SemProjector(
            ProjectorShape(sem_width=sem_width, text_width=TINY_TEXT_DIM, hidden_width=8)
        )
        save_projector(projector, path=folder / "projector.safetensors", lineage=lineage, text={})
        readout = fit_readout(
            torch.randn(40, sem_width), labels=torch.rand(40, 6) < 0.3, attributes=HUES, lineage=lineage
        )
        save_readout(readout, path=folder / "attribute_readout.safetensors")
        _save_random_adapter(folder, core_width=width, lineage=lineage)
    return folder


def random_profile(folder: Path, *, seed: int) -> UserProfile:
    """A profile of random numbers that the adapter of :func:`save_tiny_artefacts` reads; no MLLM is asked."""
    header, _ = ADAPTER_KIND.read(folder / "user_adapter.safetensors")
    projector = load_projector(folder / "projector.safetensors").projector
    widths = dict(zip(header["shape"]["parts"], header["shape"]["widths"], strict=True))
    widths["sem"] = projector.shape.sem_width
    generator = torch.Generator().manual_seed(seed)
    made_by = {name: value for name, value in header["lineage"].items() if name in PROFILE_PARTS}
    tensors: dict[str, Any] = {
        name: torch.randn(widths[name.split("_")[0]], generator=generator) for name in TENSORS
    }
    return UserProfile(
        **tensors,
        counts=ProfileCounts(liked=3, disliked=2, draws=8),
        lineage=made_by,
    )


def _save_random_lora(folder: Path) -> int:
    mllm = MLLM.load(folder / "mllm")
    lora = add_lora(mllm, rank=2)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # starts at zero, where LoRA would change nothing
            torch.nn.init.normal_(parameter, std=0.05)
    save_lora(lora, path=folder / "lora")
    return mllm.hidden_size


def _save_random_adapter(folder: Path, *, core_width: int, lineage: dict[str, str]) -> None:
    bundle = DiffusionBundle.load(str(folder / "pipeline"))
    shape = FusionShape(
        parts=("aligned", "core", "image"),
        widths=(TINY_TEXT_DIM, core_width, TINY_IMAGE_DIM),
        cross_width=bundle.cross_width,
    )
    adapter = UserAdapter(bundle.unet, shape=shape)
    for parameter in adapter.attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    trained_with = {
        **lineage,
        "unet": hash_folder(folder / "pipeline" / "unet"),
        "projector": hash_file(folder / "projector.safetensors"),
    }
    save_user_adapter(adapter, path=folder / "user_adapter.safetensors", lineage=trained_with)
