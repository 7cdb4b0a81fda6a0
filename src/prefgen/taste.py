"""From a few liked and disliked images to a :class:`UserProfile`: the MLLM's side of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prefgen.data.images import MAX_IMAGE_BYTES, decode_image
from prefgen.errors import CheckpointError, DataError
from prefgen.lineage import hash_folder, hash_json
from prefgen.models.image_encoder import ImageEncoder
from prefgen.models.lora import load_lora
from prefgen.models.mllm import MLLM, Attention
from prefgen.models.probes import LayerChoice, choice_to_json, read_choice
from prefgen.models.quantization import Quantization
from prefgen.models.questions import parse_attributes
from prefgen.models.representation import References, embed_references, list_attributes
from prefgen.profile import UserProfile
from prefgen.profile_math import Reading, first_profile, updated_profile

MAX_REFERENCES = 8
"""Images of either side in one draw: what the MLLM and stage predict work with."""

NUM_DRAWS = 8
"""Draws whose mean is the profile: the order of images, and which of many, should not decide."""

Picture = Image.Image


@dataclass(frozen=True, kw_only=True)
class TasteModels:
    """What a profile is made by.

    Attributes:
        mllm: the MLLM with its LoRA.
        choice: where core and sem are read.
        image_encoder: the diffusion pipeline's.
        lineage: hashes of all four.
    """

    mllm: MLLM
    choice: LayerChoice
    image_encoder: ImageEncoder
    lineage: dict[str, str]

    @staticmethod
    def load(
        *,
        mllm: str,
        lora: Path | None,
        probe: Path,
        image_encoder: Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: Attention = "sdpa",
        quantization: Quantization = "none",
    ) -> TasteModels:
        """Read the models.

        Args:
            mllm: folder or hub id.
            lora: stage vqa's artefact; None for the MLLM as it was before.
            probe: stage probe's ``probe.json``.
            image_encoder: folder of the CLIP image encoder, with its preprocessing in it or beside it.
            dtype: of the frozen weights.
            device: where to work.
            attention: of the MLLM; see :meth:`MLLM.load`.
            quantization: likewise.

        Raises:
            CheckpointError: something is missing or does not fit.
        """
        folder = Path(mllm)
        models = {
            "mllm": hash_folder(folder) if folder.is_dir() else f"hub:{mllm}",
            "lora": hash_folder(lora) if lora is not None else "none",
        }
        choice = read_choice(probe, lineage=models)
        lineage = {
            **models,
            "probe": hash_json(choice_to_json(choice)),
            "image_encoder": hash_folder(image_encoder),
        }
        model = MLLM.load(mllm, dtype=dtype, device=device, attention=attention, quantization=quantization)
        if lora is not None:
            load_lora(model, path=lora, mllm_hash=models["mllm"])
        deepest = max(choice.core_layer, *choice.sem_layers)
        if deepest > model.num_layers:
            raise CheckpointError(
                f"{probe} reads layer {deepest}, but the MLLM at {mllm} has {model.num_layers}; "
                "run 'prefgen fit --stage probe' on this MLLM"
            )
        encoder = ImageEncoder.load(image_encoder, dtype=dtype, device=device)
        return TasteModels(mllm=model, choice=choice, image_encoder=encoder, lineage=lineage)

    @torch.no_grad()
    def build_profile(
        self,
        liked: Sequence[Picture],
        *,
        disliked: Sequence[Picture] = (),
        user_id: str | None = None,
        words: bool = False,
        seed: int = 0,
        num_draws: int = NUM_DRAWS,
        max_references: int = MAX_REFERENCES,
        progress: Callable[[str], object] | None = None,
    ) -> UserProfile:
        """Build a profile; one liked image and no dislikes are enough.

        Args:
            liked: RGB images this user likes, at least one.
            disliked: images this user does not like; may be empty.
            user_id: stored only if given.
            words: also ask the MLLM what this user likes and dislikes, and store the answer.
            seed: decides which images stand in which draw and in which order.
            num_draws: draws of references that are averaged; a single image needs only one.
            max_references: images of either side in one draw.
            progress: called with the name of each step before it begins.

        Raises:
            DataError: no liked image.
        """
        if not liked:
            raise DataError("a profile needs at least one liked image, got 0")
        tell = progress or _quiet
        reading = self._read(
            liked,
            disliked=disliked,
            seed=seed,
            num_draws=num_draws,
            max_references=max_references,
            tell=tell,
        )
        profile = first_profile(reading, lineage=self.lineage, user_id=user_id)
        if not words:
            return profile
        tell("putting it into words")
        likes, dislikes = self.words(liked, disliked=disliked, max_references=max_references)
        return replace(profile, likes=likes, dislikes=dislikes)

    @torch.no_grad()
    def update_profile(
        self,
        profile: UserProfile,
        *,
        liked: Sequence[Picture] = (),
        disliked: Sequence[Picture] = (),
        words: bool = False,
        seed: int = 0,
        num_draws: int = NUM_DRAWS,
        max_references: int = MAX_REFERENCES,
        progress: Callable[[str], object] | None = None,
    ) -> UserProfile:
        """A profile after more images, even one; the earlier images are not needed.

        The image means are exactly those of a build from all images. ``core_embeds`` and ``sem_embeds`` are
        near them: see :mod:`prefgen.profile_math`. Adding several images at once keeps them nearer than one
        by one.

        Args:
            profile: made by these models.
            liked: more RGB images this user likes.
            disliked: more images this user does not like.
            words: also ask the MLLM about the new images and add that to the stored words; without it stored
                words are dropped, as they speak of the earlier images alone.
            seed: as for :meth:`build_profile`.
            num_draws: draws of references from the new images.
            max_references: images of either side in one draw.
            progress: called with the name of each step before it begins.

        Raises:
            DataError: no image, or words asked for where the profile holds none of the earlier images.
            CheckpointError: the profile was made by other models.
        """
        if not liked and not disliked:
            raise DataError("an update needs at least one liked or disliked image, got 0")
        if words and profile.likes is None and profile.dislikes is None:
            raise DataError(
                "the profile holds no words of its earlier images to add to; update it without words, or "
                "build it from all images with words"
            )
        profile.require_lineage(self.lineage, what="the models at hand")
        tell = progress or _quiet
        reading = self._read(
            liked,
            disliked=disliked,
            seed=seed,
            num_draws=num_draws,
            max_references=max_references,
            tell=tell,
        )
        updated = updated_profile(profile, reading=reading)
        if not words:
            return updated
        tell("putting it into words")
        likes, dislikes = self.words(liked, disliked=disliked, max_references=max_references)
        return replace(
            updated,
            likes=joined_words(profile.likes, likes, but=dislikes),
            dislikes=joined_words(profile.dislikes, dislikes, but=likes),
        )

    def _read(
        self,
        liked: Sequence[Picture],
        *,
        disliked: Sequence[Picture],
        seed: int,
        num_draws: int,
        max_references: int,
        tell: Callable[[str], object],
    ) -> Reading:
        tell("looking at the images")
        pictures = [*liked, *disliked]
        features = self.mllm.encode_images(pictures)
        tell("reading the taste")
        draws = _draws(
            len(liked),
            num_disliked=len(disliked),
            num_draws=num_draws if len(pictures) > 1 else 1,
            max_references=max_references,
            seed=seed,
        )
        references = [*draws, *(draw.swapped() for draw in draws)]
        states = embed_references(
            self.mllm, references=references, image_features=features, choice=self.choice
        )
        core, sem = (_means(rows, count=len(draws)) for rows in (states.core, states.sem))
        tell("embedding the images")
        embeds = self.image_encoder.embed(pictures)
        return Reading(
            core_embeds=core[0],
            sem_embeds=sem[0],
            core_negative=core[1],
            sem_negative=sem[1],
            liked=embeds[: len(liked)],
            disliked=embeds[len(liked) :],
            draws=len(draws),
        )

    def words(
        self,
        liked: Sequence[Picture],
        *,
        disliked: Sequence[Picture] = (),
        max_references: int = MAX_REFERENCES,
    ) -> tuple[str, str]:
        """What the MLLM says this user likes and dislikes, as two comma lists.

        Evenly spaced images stand for a side that has more than ``max_references``.
        """
        sides = {
            "liked": _spread(liked, count=max_references),
            "disliked": _spread(disliked, count=max_references),
        }
        likes = list_attributes(self.mllm, liked=sides["liked"], disliked=sides["disliked"], kind="likes")
        dislikes = list_attributes(
            self.mllm, liked=sides["liked"], disliked=sides["disliked"], kind="dislikes"
        )
        return ", ".join(likes), ", ".join(dislikes)


def read_images(path: Path) -> list[Picture]:
    """The images of :func:`list_images`, as RGB.

    Raises:
        DataError: nothing there, an empty folder, or a file that is no readable image.
    """
    return [read_image(file) for file in list_images(path)]


def list_images(path: Path) -> list[Path]:
    """The files of a folder in the order of their names, or the one image file that ``path`` is.

    Hidden files are passed over; anything else that is no image is refused later, never left out silently.

    Raises:
        DataError: nothing there, or an empty folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"no folder or image at {path}")
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    if not files:
        raise DataError(f"{path} is empty; put at least one image (png, jpeg, webp ..) in it")
    return files


def joined_words(stored: str | None, found: str, *, but: str) -> str:
    """Two comma lists as one, each word once; stored ones that the newer images contradict are left out."""
    against = set(parse_attributes(but))
    kept = [word for word in parse_attributes(stored or "") if word not in against]
    return ", ".join(dict.fromkeys([*kept, *parse_attributes(found)]))


def read_image(file: Path) -> Picture:
    """One image file as RGB.

    Raises:
        DataError: a folder, or no readable image.
    """
    if file.exists() and not file.is_file():
        raise DataError(f"{file} is a folder; images have to lie directly in {file.parent}")
    try:
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise DataError(f"{file} has {file.stat().st_size:,} bytes; at most {MAX_IMAGE_BYTES:,}")
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    return decode_image(data, where=str(file), any_format=True)


def _draws(
    num_liked: int, *, num_disliked: int, num_draws: int, max_references: int, seed: int
) -> list[References]:
    """Rows of the features for each draw: liked images come first there, disliked ones behind."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(num_draws):
        liked = rng.permutation(num_liked)[:max_references]
        disliked = num_liked + rng.permutation(num_disliked)[:max_references]
        draws.append(References(liked=[int(i) for i in liked], disliked=[int(i) for i in disliked]))
    return draws


def _means(rows: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """(D,) mean of the first ``count`` rows and of the rest, float32 on the CPU."""
    rows = rows.double().cpu()
    return rows[:count].mean(dim=0).float(), rows[count:].mean(dim=0).float()


def _spread(pictures: Sequence[Picture], *, count: int) -> list[Picture]:
    number = min(count, len(pictures))
    return [pictures[i * len(pictures) // number] for i in range(number)]


def _quiet(step: str) -> None:
    del step
