"""The diffusion side of the pipeline: the frozen bundle and what was trained for it, checked to fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from prefgen.artefacts import Artefacts
from prefgen.errors import CheckpointError
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import PartName
from prefgen.models.projector import SemProjector, load_projector
from prefgen.models.user_adapter import UserAdapter, load_user_adapter
from prefgen.profile import UserProfile


@dataclass(frozen=True, kw_only=True)
class Painter:
    """The diffusion side: frozen bundle, projector and user adapter.

    Attributes:
        bundle: the pipeline.
        projector: sem into the text space; None where the adapter does not read it.
        adapter: installed in the bundle's UNet.
        lineage: what the adapter was trained with.
    """

    bundle: DiffusionBundle
    projector: SemProjector | None
    adapter: UserAdapter
    lineage: dict[str, str]

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
        loaded = load_user_adapter(artefacts.user_adapter, unet=bundle.unet)
        lineage = loaded.lineage
        _require_part(artefacts, part="unet", lineage=lineage, key="unet")
        projector = None
        if "aligned" in loaded.adapter.fusion.shape.parts:
            artefacts.require("projector")
            if lineage.get("projector") not in (None, hash_file(artefacts.projector)):
                raise CheckpointError(
                    f"{artefacts.user_adapter} was trained with another projector than "
                    f"{artefacts.projector}; run 'prefgen fit --stage inject' again after stage align"
                )
            found = load_projector(artefacts.projector)
            # SDXL has two text encoders; the lineage names the one whose space the projector maps into.
            encoder = found.text.get("text_encoder", "text_encoder")
            _require_part(artefacts, part=encoder, lineage=lineage, key="text_encoder")
            projector = found.projector.to(device)
        adapter = loaded.adapter.to(device)
        adapter.attention.install()
        return Painter(bundle=bundle, projector=projector, adapter=adapter, lineage=lineage)

    @torch.no_grad()
    def parts(
        self, profile: UserProfile, *, count: int, side: Literal["liked", "disliked"] = "liked"
    ) -> dict[PartName, torch.Tensor]:
        """The parts (count,D) that the adapter reads, of one user or the negative twin, ``count`` times.

        Raises:
            CheckpointError: sem of another width, or nothing is known of that side that the adapter reads.
        """
        sem, core, image = profile.side(side)
        rows: dict[PartName, torch.Tensor] = {"core": core}
        if bool(image.any()):  # zeros say that there is no such image; standardised they would be one
            rows["image"] = image
        if self.projector is not None:
            device = self.projector.text_mean.device
            width = self.projector.shape.sem_width
            if len(sem) != width:
                raise CheckpointError(
                    f"the profile's sem has {len(sem)} numbers, the projector takes {width}"
                )
            rows["aligned"] = self.projector(sem[None].to(device))[0]
        wanted = self.adapter.fusion.shape.parts
        if not set(wanted) & set(rows):
            raise CheckpointError(
                f"the profile has no {side} image, and this adapter reads nothing but images"
            )
        return {name: value.expand(count, -1) for name, value in rows.items() if name in wanted}


def _require_part(artefacts: Artefacts, *, part: str, lineage: Mapping[str, str], key: str) -> None:
    folder = artefacts.pipeline / part
    if key in lineage and folder.is_dir() and hash_folder(folder) != lineage[key]:
        raise CheckpointError(
            f"{artefacts.user_adapter} was trained with another {part} than {folder} holds; "
            "use the pipeline it was trained with"
        )
