"""History -> profile -> images, as a few lines of Python.

::

    from prefgen.pipeline import PrefGenPipeline

    pipeline = PrefGenPipeline.load()
    profile = pipeline.build_profile(liked, disliked=disliked)
    print(pipeline.explain(profile).likes)
    images = pipeline.generate("a red fox", profile=profile, user_scale=0.8, num_images=4, seed=0)

Both sides load when they are first needed: building a profile reads no UNet, drawing reads no MLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from prefgen.artefacts import Artefacts
from prefgen.errors import CheckpointError, DataError
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import PartName
from prefgen.models.pixels import to_pil
from prefgen.models.projector import SemProjector, load_projector
from prefgen.models.readout import AttributeReadout, ReadWord, load_readout
from prefgen.models.sampling import SampleUsers, sample
from prefgen.models.user_adapter import UserAdapter, load_user_adapter
from prefgen.profile import UserProfile
from prefgen.taste import TasteModels

BATCH_SIZE = 4
"""Images drawn at a time. Sums of another batch size may round differently, so it is noted beside images."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A profile in words.

    Attributes:
        likes: comma list of attributes; None where nothing can be said.
        dislikes: likewise.
        source: ``mllm`` for the MLLM's own answer, stored in the profile; ``readout`` for a linear reading of
            its embeddings, where each attribute stands with its probability.
    """

    likes: str | None
    dislikes: str | None
    source: Literal["mllm", "readout"]


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


def _require_part(artefacts: Artefacts, *, part: str, lineage: Mapping[str, str], key: str) -> None:
    folder = artefacts.pipeline / part
    if key in lineage and folder.is_dir() and hash_folder(folder) != lineage[key]:
        raise CheckpointError(
            f"{artefacts.user_adapter} was trained with another {part} than {folder} holds; "
            "use the pipeline it was trained with"
        )


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

    @cached_property
    def readout(self) -> AttributeReadout:
        """What reads attributes from ``sem_embeds``, read when first needed."""
        return load_readout(self.artefacts.attribute_readout)

    def explain(self, profile: UserProfile) -> Explanation:
        """What this user likes and dislikes, from the profile alone; neither MLLM nor UNet is read.

        The stored words where there are any. Else attributes read linearly from ``sem_embeds``, and from its
        negative twin what is disliked; nothing is said of dislikes where no disliked image was seen.

        Raises:
            CheckpointError: no stored words and no readout, or the profile is of another lineage.
        """
        if profile.likes is not None or profile.dislikes is not None:
            return Explanation(likes=profile.likes, dislikes=profile.dislikes, source="mllm")
        self.artefacts.require("attribute_readout")
        place = self.artefacts.attribute_readout
        profile.require_lineage(
            self.readout.lineage,
            what=f"the readout {place}",
            mend="name the artefacts it was built with, or build the profile again",
        )
        dislikes = _as_list(self.readout.read(profile.sem_negative)) if profile.counts.disliked else None
        likes = _as_list(self.readout.read(profile.sem_embeds))
        return Explanation(likes=likes, dislikes=dislikes, source="readout")

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
            negative_prompt: text of the unconditional branch; "" is none.
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
                # No text is not the empty text: SDXL's base was trained with zeros there, and so was inject.
                negative_prompts=[negative_prompt] * count if negative_prompt else None,
            )
            images += to_pil(pixels)
            if progress is not None:
                progress(count)
        return images


def _as_list(words: Sequence[ReadWord]) -> str:
    return ", ".join(f"{word.attribute} ({word.probability:.2f})" for word in words)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
