"""How far a judge can be believed: what it reads right on known pictures, and what it may judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from prefgen.evaluate.judges import Judgement

MINIMUM_ACCURACY = 0.80
"""Attributes read less often than this on the VAE round trip are not judged (design, section 6)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One attribute: how often the judge names it where it is shown.

    Attributes:
        accuracy: share in [0,1]; 0 where ``count`` is 0.
        count: pictures that show it.
    """

    accuracy: float
    count: int


def read_attributes(
    judgement: Judgement,
    *,
    groups: Mapping[str, Sequence[str]],
    shown: Sequence[Sequence[str]],
) -> dict[str, Reading]:
    """Attribute -> how often it is its group's likeliest value among the pictures that show it.

    Args:
        judgement: of B pictures.
        groups: attribute words by group, in the order of the judge's heads.
        shown: true attributes of each picture; words of no group are passed over.
    """
    readings: dict[str, Reading] = {}
    for name, words in groups.items():
        likeliest = judgement.groups[name].argmax(dim=1).tolist()
        for column, word in enumerate(words):
            guesses = [guess for guess, own in zip(likeliest, shown, strict=True) if word in own]
            right = sum(guess == column for guess in guesses)
            readings[word] = Reading(accuracy=right / max(1, len(guesses)), count=len(guesses))
    return readings


def judged_attributes(
    readings: Mapping[str, Reading], *, minimum: float = MINIMUM_ACCURACY
) -> frozenset[str]:
    """The attributes read reliably; one that was never shown is not known to be."""
    return frozenset(word for word, found in readings.items() if found.count and found.accuracy >= minimum)


def subject_accuracy(
    probabilities: Tensor, *, subjects: Sequence[str], prompts: Sequence[str], among: Sequence[str]
) -> float:
    """Share of pictures (B,subjects) whose prompt is the likeliest of the subjects ``among``."""
    columns = [list(subjects).index(name) for name in among]
    named = probabilities[:, columns].argmax(dim=1).tolist()
    hits = [among[column] == prompt for column, prompt in zip(named, prompts, strict=True)]
    return float(sum(hits)) / max(1, len(hits))
