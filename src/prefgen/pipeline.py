"""History -> profile -> images, as a few lines of Python.

::

    from prefgen.pipeline import PrefGenPipeline

    pipeline = PrefGenPipeline.load()
    profile = pipeline.build_profile(liked, disliked=disliked)
    images = pipeline.generate("a red fox", profile=profile, user_scale=0.8, num_images=4, seed=0)

Both sides load when they are first needed: building a profile reads no UNet, drawing reads no MLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from prefgen.errors import CheckpointError, DataError
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import PartName
from prefgen.models.pixels import to_pil
from prefgen.models.projector import SemProjector, load_projector
from prefgen.models.sampling import SampleUsers, sample
from prefgen.models.user_adapter import UserAdapter, load_user_adapter
from prefgen.profile import UserProfile
from prefgen.taste import TasteModels

MINI_ASSETS = Path(__file__).resolve().parent / "assets" / "mini"
"""What ships with prefgen: the foundation, and artefacts trained on it."""

BATCH_SIZE = 4
"""Images drawn at a time. Sums of another batch size may round differently, so it is noted beside images."""

_ADAPTER_PARTS = ("unet", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """Where everything lies.

    Attributes:
        mllm: folder or hub id of the MLLM.
        lora: stage vqa's LoRA folder.
        probe: stage probe's ``probe.json``.
        pipeline: the diffusers pipeline folder, with an image encoder in it.
        projector: stage align's file.
        user_adapter: stage inject's file.
    """

    mllm: str
    lora: Path
    probe: Path
    pipeline: Path
    projector: Path
    user_adapter: Path

    @staticmethod
    def find(
        folder: Path | None = None, *, pipeline: Path | None = None, mllm: str | None = None
    ) -> Artefacts:
        """Names in a work folder of the four stages, or in a flat folder like the shipped one.

        Args:
            folder: a workdir (``vqa/lora``, ``probe/probe.json``, ``align/..``, ``inject/..``) or a folder
                that holds ``lora/``, ``probe.json``, ``projector.safetensors`` and
                ``user_adapter.safetensors``; None for what ships with prefgen.
            pipeline: the pipeline they were trained with; None for the shipped mini one.
            mllm: the MLLM they were trained with; None for the shipped mini one.

        Raises:
            CheckpointError: no such folder.
        """
        root = MINI_ASSETS if folder is None else folder
        if not root.is_dir():
            raise CheckpointError(
                f"no artefacts at {root}; give a work folder in which all stages were fitted"
            )
        staged = any((root / stage).is_dir() for stage in ("vqa", "probe", "align", "inject"))
        parts = ("vqa", "probe", "align", "inject") if staged else ("", "", "", "")
        return Artefacts(
            mllm=str(MINI_ASSETS / "mllm") if mllm is None else mllm,
            lora=root / parts[0] / "lora",
            probe=root / parts[1] / "probe.json",
            pipeline=MINI_ASSETS / "pipeline" if pipeline is None else pipeline,
            projector=root / parts[2] / "projector.safetensors",
            user_adapter=root / parts[3] / "user_adapter.safetensors",
        )

    def require(self, *names: str) -> None:
        """Refuse to go on without some of them, before anything heavy is read.

        Raises:
            CheckpointError: naming what is missing and how it is made.
        """
        made_by = {
            "lora": "prefgen fit --stage vqa",
            "probe": "prefgen fit --stage probe",
            "projector": "prefgen fit --stage align",
            "user_adapter": "prefgen fit --stage inject",
            "pipeline": "make foundation",
        }
        for name in names:
            path = Path(getattr(self, name))
            if not path.exists():
                raise CheckpointError(
                    f"no {name.replace('_', ' ')} at {path}; make it with '{made_by[name]}', "
                    "or name the folder that holds the trained artefacts"
                )

    def as_text(self) -> dict[str, str]:
        """Field -> path, for a record beside images."""
        return {item.name: str(getattr(self, item.name)) for item in fields(self)}


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
        for part in _ADAPTER_PARTS:
            folder = artefacts.pipeline / part
            if part in lineage and folder.is_dir() and hash_folder(folder) != lineage[part]:
                raise CheckpointError(
                    f"{artefacts.user_adapter} was trained with another {part} than {folder} holds; "
                    "use the pipeline it was trained with"
                )
        projector = None
        if "aligned" in loaded.adapter.fusion.shape.parts:
            artefacts.require("projector")
            if lineage.get("projector") not in (None, hash_file(artefacts.projector)):
                raise CheckpointError(
                    f"{artefacts.user_adapter} was trained with another projector than "
                    f"{artefacts.projector}; run 'prefgen fit --stage inject' again after stage align"
                )
            projector = load_projector(artefacts.projector).projector.to(device)
        adapter = loaded.adapter.to(device)
        adapter.attention.install()
        return Painter(bundle=bundle, projector=projector, adapter=adapter, lineage=lineage)

    @torch.no_grad()
    def parts(self, profile: UserProfile, *, count: int) -> dict[PartName, torch.Tensor]:
        """The parts (count,D) that the adapter reads, of one user ``count`` times."""
        sem, core, image = profile.side("liked")
        rows: dict[PartName, torch.Tensor] = {"core": core, "image": image}
        if self.projector is not None:
            device = self.projector.text_mean.device
            width = self.projector.shape.sem_width
            if len(sem) != width:
                raise CheckpointError(
                    f"the profile's sem has {len(sem)} numbers, the projector takes {width}"
                )
            rows["aligned"] = self.projector(sem[None].to(device))[0]
        wanted = self.adapter.fusion.shape.parts
        return {name: value.expand(count, -1) for name, value in rows.items() if name in wanted}


class PrefGenPipeline:
    """Profiles and images from one set of artefacts.

    Attributes:
        artefacts: where they lie.
    """

    def __init__(self, artefacts: Artefacts, *, dtype: torch.dtype, device: str | torch.device) -> None:
        self.artefacts = artefacts
        self._dtype, self._device = dtype, device

    @staticmethod
    def load(
        artefacts: Path | None = None,
        *,
        pipeline: Path | None = None,
        mllm: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> PrefGenPipeline:
        """Name the artefacts; see :meth:`Artefacts.find`. Nothing heavy is read yet."""
        found = Artefacts.find(artefacts, pipeline=pipeline, mllm=mllm)
        return PrefGenPipeline(found, dtype=dtype, device=device)

    @cached_property
    def taste(self) -> TasteModels:
        """The MLLM's side, read when first needed."""
        places = self.artefacts
        places.require("lora", "probe", "pipeline")
        return TasteModels.load(
            mllm=places.mllm,
            lora=places.lora,
            probe=places.probe,
            image_encoder=places.pipeline / "image_encoder",
            dtype=self._dtype,
            device=self._device,
        )

    @cached_property
    def painter(self) -> Painter:
        """The diffusion side, read when first needed."""
        return Painter.load(self.artefacts, dtype=self._dtype, device=self._device)

    def build_profile(
        self,
        liked: Sequence[Image.Image],
        *,
        disliked: Sequence[Image.Image] = (),
        user_id: str | None = None,
        words: bool = False,
        seed: int = 0,
    ) -> UserProfile:
        """A profile from images; one liked image is enough. See :meth:`TasteModels.build_profile`."""
        return self.taste.build_profile(liked, disliked=disliked, user_id=user_id, words=words, seed=seed)

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        profile: UserProfile,
        user_scale: float = 0.8,
        num_images: int = 1,
        seed: int = 0,
        num_steps: int = 25,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int], object] | None = None,
    ) -> list[Image.Image]:
        """Draw for one user.

        Args:
            prompt: what to draw.
            profile: for whom; made by the models the adapter was trained with.
            user_scale: strength of the user branch; 0 gives the base model's images bit for bit.
            num_images: how many; image i has the seed ``seed + i``.
            seed: of the first image.
            num_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 or less switches it off.
            negative_prompt: text of the unconditional branch.
            batch_size: images drawn at a time; another number may change last bits.
            progress: called with the number of images just drawn.

        Raises:
            CheckpointError: the profile is of another lineage.
            DataError: a count below 1, a scale that is not finite, or a prompt too long for the text encoder.
        """
        _check_counts(num_images=num_images, num_steps=num_steps, batch_size=batch_size)
        painter = self.painter
        profile.require_lineage(painter.lineage, what=f"the adapter {self.artefacts.user_adapter}")
        images: list[Image.Image] = []
        for start in range(0, num_images, batch_size):
            count = min(batch_size, num_images - start)
            users = SampleUsers.of(
                painter.adapter, parts=painter.parts(profile, count=count), scale=user_scale
            )
            pixels = sample(
                painter.bundle,
                [prompt] * count,
                seeds=[seed + start + i for i in range(count)],
                users=users,
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                negative_prompts=[negative_prompt] * count,
            )
            images += to_pil(pixels)
            if progress is not None:
                progress(count)
        return images


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
