"""How much one user would like each of some pictures, from the profile's vectors or by asking the MLLM.

A profile holds no images, so the MLLM cannot be shown the history again, and sem and core are not read from
pictures one by one: nothing in the file can be put before "Does this user like this image?". What a picture
and a profile do share is the image encoder's space, and there the profile holds the mean of either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prefgen.errors import CheckpointError, DataError
from prefgen.models.calibration import Calibration
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, pack_batch
from prefgen.models.questions import YES_NO, history_pieces, like_question
from prefgen.profile import UserProfile

ScoredBy = Literal["both means", "liked mean", "mllm", "calibrated mllm"]

MEANINGS: dict[ScoredBy, str] = {
    "both means": (
        "where each image lies between the profile's mean disliked (-0.5) and mean liked (+0.5) image "
        "embedding; 0 is half way. Not a probability"
    ),
    "liked mean": (
        "cosine of each image embedding with the profile's mean liked one; no disliked image was seen, so "
        "only the order says something. Not a probability"
    ),
    "mllm": (
        'the MLLM\'s probability of "Yes" to "Does this user like this image?" behind the images given, as '
        "stated: no calibration.json stands beside the LoRA ('prefgen test --stage vqa' writes one)"
    ),
    "calibrated mllm": (
        'the MLLM\'s probability of "Yes" to "Does this user like this image?" behind the images given, '
        "corrected by calibration.json to how often it is right about users of no training"
    ),
}
"""What the numbers mean, by where they come from."""

QUESTIONS_PER_PASS = 16
"""Images asked about in one row; each is answered as if it stood alone."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A number an image, higher for what the user likes more.

    Attributes:
        values: (N,) float32; see :data:`MEANINGS` for their range.
        scored_by: where they come from.
    """

    values: Tensor
    scored_by: ScoredBy

    def order(self) -> list[int]:
        """Positions, best first; equals stay in their order."""
        return [int(i) for i in self.values.argsort(descending=True, stable=True)]


def scores_by_vectors(profile: UserProfile, *, embeds: Tensor) -> Scores:
    """Compare image embeddings with the means of the two sides.

    With both sides: the linear rule whose sign says which mean is nearer. The mean that all pictures share,
    most of any CLIP embedding, cancels in the difference. Without disliked images there is no difference.

    Args:
        profile: whose taste.
        embeds: (N,Dimage) of the images, by the encoder that made the profile.

    Raises:
        CheckpointError: embeddings of another width.
    """
    if embeds.shape[1] != len(profile.image_mean):
        raise CheckpointError(
            f"the image encoder makes {embeds.shape[1]} numbers an image, the profile has "
            f"{len(profile.image_mean)}"
        )
    rows, liked, disliked = embeds.double(), profile.image_mean.double(), profile.image_mean_negative.double()
    across = liked - disliked
    if profile.counts.disliked and bool(across.any()):
        values = (rows - (liked + disliked) / 2) @ across / across.square().sum()
        return Scores(values=values.float(), scored_by="both means")
    values = torch.cosine_similarity(rows, liked[None], dim=1)
    return Scores(values=values.float(), scored_by="liked mean")


@torch.no_grad()
def scores_by_mllm(
    mllm: MLLM,
    images: Sequence[Image.Image],
    *,
    liked: Sequence[Image.Image],
    disliked: Sequence[Image.Image] = (),
    num_draws: int = 4,
    max_references: int = 8,
    seed: int = 0,
    calibration: Calibration | None = None,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Ask the MLLM about each image behind the user's history.

    Args:
        mllm: with its LoRA.
        images: what to ask about.
        liked: images the user likes, at least one.
        disliked: images the user does not like.
        num_draws: draws of references whose probabilities are averaged: their order, which side stands first,
            and which of many, should not decide.
        max_references: images of either side in one draw.
        seed: of the draws.
        calibration: corrects every draw's probability before they are averaged: it was fitted on single ones.
        progress: called with the number of images just answered.

    Raises:
        DataError: no liked image.
    """
    if not liked:
        raise DataError("asking the MLLM needs at least one liked image of the history, got 0")
    history = mllm.encode_images([*liked, *disliked])
    rng = np.random.default_rng(seed)
    histories = [
        history_pieces(
            [int(i) for i in rng.permutation(len(liked))[:max_references]],
            disliked=[len(liked) + int(i) for i in rng.permutation(len(disliked))[:max_references]],
            disliked_first=bool(draw % 2),
        )
        for draw in range(num_draws if len(liked) + len(disliked) > 1 else 1)
    ]
    found = []
    for start in range(0, len(images), QUESTIONS_PER_PASS):
        some = images[start : start + QUESTIONS_PER_PASS]
        features = torch.cat([history, mllm.encode_images(some)])
        questions = [like_question(len(history) + i) for i in range(len(some))]
        items = [PackItem(history=pieces, questions=questions) for pieces in histories]
        batch = pack_batch(mllm.encoder, items=items).to(mllm.device)
        hidden = mllm.hidden(batch, image_features=features)
        yes = mllm.choice_logits(batch, hidden=hidden, answers=YES_NO).softmax(-1)[:, 0].float().cpu()
        if calibration is not None:
            yes = torch.from_numpy(calibration.apply(yes.double().numpy())).float()
        found.append(yes.view(len(histories), len(some)).mean(dim=0))
        if progress is not None:
            progress(len(some))
    return Scores(
        values=torch.cat(found) if found else torch.empty(0),
        scored_by="mllm" if calibration is None else "calibrated mllm",
    )
