"""Trained artefacts -> a folder that needs nothing but stock diffusers: adapter, profiles, script, card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from prefgen import standalone
from prefgen.artefacts import Artefacts
from prefgen.errors import ConfigError
from prefgen.lineage import hash_file
from prefgen.model_card import write_card
from prefgen.models.ip_adapter import export_ip_adapter, read_adapter
from prefgen.models.text_lora import TEXT_LORA_FILE
from prefgen.models.user_adapter import KIND
from prefgen.painter import require_projector
from prefgen.profile import UserProfile

ADAPTER_FILE = "ip_adapter.safetensors"
SCRIPT_FILE = "draw.py"
CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export left behind.

    Attributes:
        adapter: what ``pipe.load_ip_adapter`` reads.
        script: draws for a profile with stock diffusers alone.
        card: the model card.
        embeds: one file a profile, with ``ip_adapter_image_embeds`` (2,P,D) in it.
        num_parameters: numbers in the adapter that stock diffusers reads.
    """

    adapter: Path
    script: Path
    card: Path
    embeds: tuple[Path, ...]
    num_parameters: int


def export_for_diffusers(
    artefacts: Artefacts,
    *,
    out: Path,
    profiles: Sequence[Path] = (),
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Write the folder. Neither UNet nor MLLM is read, so SDXL takes no more memory than its adapter.

    Args:
        artefacts: where the trained parts lie.
        out: a new or empty folder.
        profiles: profiles to turn into ready ``ip_adapter_image_embeds``.
        dtype: of the adapter's weights; below float32 the images are near ours, not equal.

    Raises:
        ConfigError: ``out`` is occupied, or two profiles have one name.
        CheckpointError: an artefact or profile is absent, torn, or of another lineage.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out {out} is not an empty folder; name a new one, nothing is ever overwritten")
    names = [profile.stem for profile in profiles]
    if len(set(names)) != len(names):
        raise ConfigError(f"two of the profiles have one name: {', '.join(sorted(names))}")
    artefacts.require("user_adapter")
    header, _ = KIND.read(artefacts.user_adapter)
    projector = None
    if "aligned" in header["shape"]["parts"]:
        require_projector(artefacts, lineage=header["lineage"])
        projector = artefacts.projector
    read = [UserProfile.load(path) for path in profiles]
    for profile in read:
        profile.require_lineage(header["lineage"], what=f"the adapter {artefacts.user_adapter}")
    out.mkdir(parents=True, exist_ok=True)
    adapter = out / ADAPTER_FILE
    export_ip_adapter(artefacts.user_adapter, path=adapter, projector=projector, dtype=dtype)
    lora = artefacts.user_adapter.with_name(TEXT_LORA_FILE)
    if lora.is_file():
        shutil.copyfile(lora, out / TEXT_LORA_FILE)
    script = out / SCRIPT_FILE
    shutil.copyfile(standalone.__file__, script)
    embeds = tuple(
        _write_embeds(adapter, profile=path, path=out / f"{path.stem}.embeds.safetensors")
        for path in profiles
    )
    source = read_adapter(adapter)
    statistics = ("fusion.mean", "fusion.scale")
    num_parameters = sum(t.numel() for name, t in source.state.items() if name not in statistics)
    written = [path for path in (adapter, out / TEXT_LORA_FILE, *embeds) if path.is_file()]
    files = {path.name: hash_file(path) for path in written}
    write_card(
        out / CARD_FILE, artefacts=artefacts, header=header, num_parameters=num_parameters, files=files
    )
    return Exported(
        adapter=adapter,
        script=script,
        card=out / CARD_FILE,
        embeds=embeds,
        num_parameters=num_parameters,
    )


def _write_embeds(adapter: Path, *, profile: Path, path: Path) -> Path:
    embeds = standalone.image_embeds(adapter, profile=profile)
    path.write_bytes(to_bytes({"ip_adapter_image_embeds": embeds}))
    return path
