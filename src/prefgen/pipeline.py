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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from prefgen.artefacts import Artefacts
from prefgen.errors import DataError
from prefgen.lineage import hash_folder
from prefgen.models.calibration import Calibration
from prefgen.models.image_encoder import ImageEncoder
from prefgen.models.pixels import to_pil
from prefgen.models.readout import AttributeReadout, ReadWord, load_readout
from prefgen.models.sampling import SampleUsers, sample
from prefgen.models.user_schedule import CONSTANT, UserSchedule, check_negative_scale
from prefgen.painter import Painter
from prefgen.profile import UserProfile
from prefgen.ranking import Scores, scores_by_mllm, scores_by_vectors
from prefgen.stock import StockPipeline
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
        adapter: Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> PrefGenPipeline:
        """Name the artefacts; see :meth:`Artefacts.find`. Nothing heavy is read yet."""
        found = Artefacts.find(artefacts, pipeline=pipeline, mllm=mllm, adapter=adapter)
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

    def update_profile(
        self,
        profile: UserProfile,
        *,
        liked: Sequence[Image.Image] = (),
        disliked: Sequence[Image.Image] = (),
        words: bool = False,
        seed: int = 0,
    ) -> UserProfile:
        """A profile after more images, even one. See :meth:`TasteModels.update_profile`."""
        return self.taste.update_profile(profile, liked=liked, disliked=disliked, words=words, seed=seed)

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """What makes e_img, read when first needed; alone where the MLLM is not asked."""
        self.artefacts.require("pipeline")
        folder = self.artefacts.pipeline / "image_encoder"
        return ImageEncoder.load(folder, dtype=self._dtype, device=self._device)

    def score(
        self,
        images: Sequence[Image.Image],
        *,
        profile: UserProfile,
        liked: Sequence[Image.Image] = (),
        disliked: Sequence[Image.Image] = (),
        progress: Callable[[int], object] | None = None,
    ) -> Scores:
        """How much this user would like each image.

        The profile holds no history that the MLLM could be asked behind, so its image means are compared:
        :func:`prefgen.ranking.scores_by_vectors`. With the images of the history at hand the MLLM answers
        "Does this user like this image?": :func:`prefgen.ranking.scores_by_mllm`, with its probability
        corrected where the artefacts hold a calibration.

        Raises:
            CheckpointError: the profile is of another lineage, or the calibration of another LoRA.
            DataError: only disliked images of the history are given.
        """
        if liked or disliked:
            profile.require_lineage(self.taste.lineage, what="the models at hand")
            return scores_by_mllm(
                self.taste.mllm,
                images,
                liked=liked,
                disliked=disliked,
                calibration=self._calibration(),
                progress=progress,
            )
        encoder = self.image_encoder
        lineage = {"image_encoder": hash_folder(self.artefacts.pipeline / "image_encoder")}
        profile.require_lineage(lineage, what=f"the pipeline {self.artefacts.pipeline}")
        scores = scores_by_vectors(profile, embeds=encoder.embed(images))
        if progress is not None:
            progress(len(images))
        return scores

    def _calibration(self) -> Calibration | None:
        path = self.artefacts.calibration
        return Calibration.load(path, lora=self.taste.lineage["lora"]) if path.is_file() else None

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

    def wrap(self, pipe: Any) -> StockPipeline:
        """A stock diffusers pipeline that draws for users; see :class:`prefgen.stock.StockPipeline`."""
        return StockPipeline.wrap(pipe, artefacts=self.artefacts)

    @torch.no_grad()
    def ip_adapter_image_embeds(self, profile: UserProfile, *, guided: bool = True) -> list[torch.Tensor]:
        """What a stock pipeline that loaded the exported adapter takes under this name.

        Args:
            profile: for whom; made by the models the adapter was trained with.
            guided: with classifier-free guidance the user of whom nothing is known comes first.

        Returns:
            One tensor (2,P,D), or (1,P,D) without guidance.

        Raises:
            CheckpointError: the profile is of another lineage.
        """
        painter = self.painter
        profile.require_lineage(painter.lineage, what=f"the adapter {self.artefacts.user_adapter}")
        fusion = painter.adapter.fusion
        rows = fusion.rows(painter.parts(profile, count=1))
        return [torch.cat([fusion.null_rows(1), rows]) if guided else rows]

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
        negative_user_scale: float = 0.0,
        schedule: UserSchedule = CONSTANT,
        block_scales: Mapping[str, float] | None = None,
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
            negative_user_scale: strength of the user's disliked side in the unconditional branch, from which
                guidance leads away; 0 leaves an unknown user there, as in training.
            schedule: factor on both scales, step by step.
            block_scales: factor on both by block of the UNet, such as ``{"down": 0.5}``; None is 1
                everywhere.
            batch_size: images drawn at a time; another number may change last bits.
            progress: called with the number of images just drawn.

        Raises:
            CheckpointError: the profile is of another lineage.
            DataError: a count below 1, a scale that is not finite or has no branch to work in, a block that
                is not there, or a prompt too long for the text encoder.
        """
        _check_counts(num_images=num_images, num_steps=num_steps, batch_size=batch_size)
        check_negative_scale(negative_user_scale, guidance_scale=guidance_scale)
        painter = self.painter
        profile.require_lineage(painter.lineage, what=f"the adapter {self.artefacts.user_adapter}")
        images: list[Image.Image] = []
        for start in range(0, num_images, batch_size):
            count = min(batch_size, num_images - start)
            negative = None
            if negative_user_scale:
                negative = painter.parts(profile, count=count, side="disliked")
            users = SampleUsers.of(
                painter.adapter,
                parts=painter.parts(profile, count=count),
                scale=user_scale,
                negative_parts=negative,
                negative_scale=negative_user_scale,
            )
            users = replace(users, schedule=schedule, block_scales=block_scales)
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
