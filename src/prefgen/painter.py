"""The diffusion side of the pipeline: the frozen bundle and what was trained for it, checked to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from prefgen.artefacts import Artefacts
from prefgen.errors import CheckpointError
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import PartName
from prefgen.models.ip_adapter import load_adapter
from prefgen.models.projector import SemProjector, load_projector
from prefgen.models.text_lora import TEXT_LORA_FILE, load_text_lora, switch_text_lora
from prefgen.models.user_adapter import UserAdapter
from prefgen.profile import UserProfile


@dataclass(frozen=True, kw_only=True)
class UserSide:
    """What turns profiles into a user branch of one UNet.

    Attributes:
        projector: sem into the text space; None where the adapter does not read it.
        adapter: installed in the UNet.
        lineage: what the adapter was trained with.
    """

    projector: SemProjector | None
    adapter: UserAdapter
    lineage: dict[str, str]

    @staticmethod
    def for_unet(unet: Any, *, artefacts: Artefacts, device: str | torch.device = "cpu") -> UserSide:
        """Read adapter and projector, check that they belong together, and install the user branch.

        Raises:
            CheckpointError: one is missing, does not fit the UNet, or was trained with another of the others.
        """
        artefacts.require("user_adapter")
        loaded = load_adapter(artefacts.user_adapter, unet=unet)
        _require_part(artefacts, part="unet", lineage=loaded.lineage, key="unet")
        projector = loaded.projector
        if projector is None and "aligned" in loaded.adapter.fusion.shape.parts:
            require_projector(artefacts, lineage=loaded.lineage)
            found = load_projector(artefacts.projector)
            # SDXL has two text encoders; the lineage names the one whose space the projector maps into.
            encoder = found.text.get("text_encoder", "text_encoder")
            _require_part(artefacts, part=encoder, lineage=loaded.lineage, key="text_encoder")
            projector = found.projector
        adapter = loaded.adapter.to(device)
        lora = artefacts.user_adapter.with_name(TEXT_LORA_FILE)
        if lora.is_file():
            load_text_lora(unet, path=lora)
            adapter.attention.follow(partial(switch_text_lora, unet))
        adapter.attention.install()
        return UserSide(
            projector=None if projector is None else projector.to(device),
            adapter=adapter,
            lineage=loaded.lineage,
        )

    @torch.no_grad()
    def parts(
        self, profile: UserProfile, *, count: int, side: Literal["liked", "disliked"] = "liked"
    ) -> dict[PartName, torch.Tensor]:
        """The parts (count,D) that the adapter reads, of one user or the negative twin, ``count`` times.

        Raises:
            CheckpointError: sem of another width, or nothing is known of that side that the adapter reads.
        """
        wanted = self.adapter.fusion.shape.parts
        rows = profile_parts(profile, wanted=wanted, projector=self.projector, side=side)
        return {name: value.expand(count, -1) for name, value in rows.items()}


@dataclass(frozen=True, kw_only=True)
class Painter(UserSide):
    """The diffusion side: a user side, and the bundle in whose UNet it is installed.

    Attributes:
        bundle: the pipeline.
    """

    bundle: DiffusionBundle

    @staticmethod
    def load(
        artefacts: Artefacts, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Painter:
        """Read the parts and check that they belong together.

        Raises:
            CheckpointError: one is missing, or was trained with another of the others.
        """
        artefacts.require("pipeline", "user_adapter")
        bundle = DiffusionBundle.load(str(artefacts.pipeline), dtype=dtype, device=device)
        side = UserSide.for_unet(bundle.unet, artefacts=artefacts, device=device)
        return Painter(bundle=bundle, projector=side.projector, adapter=side.adapter, lineage=side.lineage)


@torch.no_grad()
def profile_parts(
    profile: UserProfile,
    *,
    wanted: Sequence[PartName],
    projector: SemProjector | None,
    side: Literal["liked", "disliked"] = "liked",
) -> dict[PartName, torch.Tensor]:
    """Those of the parts (D,) that an adapter wants and a profile, or its negative twin, knows.

    Raises:
        CheckpointError: sem of another width, or nothing is known of that side that the adapter reads.
    """
    sem, core, image = profile.side(side)
    rows: dict[PartName, torch.Tensor] = {"core": core}
    if bool(image.any()):  # zeros say that there is no such image; standardised they would be one
        rows["image"] = image
    if projector is not None:
        width = projector.shape.sem_width
        if len(sem) != width:
            raise CheckpointError(f"the profile's sem has {len(sem)} numbers, the projector takes {width}")
        rows["aligned"] = projector(sem[None].to(projector.text_mean.device))[0]
    if not set(wanted) & set(rows):
        raise CheckpointError(f"the profile has no {side} image, and this adapter reads nothing but images")
    return {name: value for name, value in rows.items() if name in wanted}


def require_projector(artefacts: Artefacts, *, lineage: Mapping[str, str]) -> None:
    """Refuse an adapter without the projector it was trained with.

    Raises:
        CheckpointError: absent, or another.
    """
    artefacts.require("projector")
    if lineage.get("projector") not in (None, hash_file(artefacts.projector)):
        raise CheckpointError(
            f"{artefacts.user_adapter} was trained with another projector than {artefacts.projector}; "
            "run 'prefgen fit --stage inject' again after stage align"
        )


def _require_part(artefacts: Artefacts, *, part: str, lineage: Mapping[str, str], key: str) -> None:
    folder = artefacts.pipeline / part
    if key in lineage and folder.is_dir() and hash_folder(folder) != lineage[key]:
        raise CheckpointError(
            f"{artefacts.user_adapter} was trained with another {part} than {folder} holds; "
            "use the pipeline it was trained with"
        )
