"""From a few liked and disliked images to a :class:`UserProfile`: the MLLM's side of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from prefgen.models.mllm import MLLM
from prefgen.models.probes import LayerChoice, choice_to_json, read_choice
from prefgen.models.representation import References, embed_references, list_attributes
from prefgen.profile import ProfileCounts, UserProfile

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
    ) -> TasteModels:
        """Read the models.

        Args:
            mllm: folder or hub id.
            lora: stage vqa's artefact; None for the MLLM as it was before.
            probe: stage probe's ``probe.json``.
            image_encoder: folder of the CLIP image encoder, with its preprocessing in it or beside it.
            dtype: of the frozen weights.
            device: where to work.

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
        model = MLLM.load(mllm, dtype=dtype, device=device)
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
        image, image_mean = _anchor(embeds[: len(liked)])
        negative, negative_mean = _anchor(embeds[len(liked) :])
        likes, dislikes = None, None
        if words:
            tell("putting it into words")
            likes, dislikes = self.words(liked, disliked=disliked, max_references=max_references)
        return UserProfile(
            core_embeds=core[0],
            sem_embeds=sem[0],
            image_embeds=image,
            core_negative=core[1],
            sem_negative=sem[1],
            image_negative=negative,
            image_mean=image_mean,
            image_mean_negative=negative_mean,
            counts=ProfileCounts(liked=len(liked), disliked=len(disliked), draws=len(draws)),
            lineage=self.lineage,
            user_id=user_id,
            likes=likes,
            dislikes=dislikes,
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
    """The images of a folder in the order of their names, or one image file, as RGB.

    Hidden files are passed over; anything else that is no image is refused, never left out silently.

    Raises:
        DataError: nothing there, an empty folder, or a file that is no readable image.
    """
    if path.is_file():
        return [_read_image(path)]
    if not path.is_dir():
        raise DataError(f"no folder or image at {path}")
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    if not files:
        raise DataError(f"{path} is empty; put at least one image (png, jpeg, webp ..) in it")
    return [_read_image(file) for file in files]


def _read_image(file: Path) -> Picture:
    if not file.is_file():
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


def _anchor(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding nearest to the mean of all (N,D), and that mean; zeros where there is none.

    One real image, not the mean: stage inject trained on embeddings of single images, and a mean of several
    lies where none of them is.
    """
    if not len(embeds):
        empty = embeds.new_zeros(embeds.shape[1])
        return empty, empty.clone()
    mean = embeds.mean(dim=0)
    nearest = int((embeds - mean).norm(dim=1).argmin())
    return embeds[nearest].clone(), mean


def _spread(pictures: Sequence[Picture], *, count: int) -> list[Picture]:
    number = min(count, len(pictures))
    return [pictures[i * len(pictures) // number] for i in range(number)]


def _quiet(step: str) -> None:
    del step
