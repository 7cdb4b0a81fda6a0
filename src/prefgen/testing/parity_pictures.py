"""Metrics of pictures and of sets of pictures beside their references."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import pairwise_cosine_similarity
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.image.kid import KernelInceptionDistance

from prefgen.evaluate.copying import nearest_distances
from prefgen.evaluate.likeness import HistoryLikeness, PairCosine, UserDiversity
from prefgen.evaluate.preference import AttributeHits, PromptFidelity, UtilityMargin, WinRate
from prefgen.evaluate.set_distances import CMMD, FrechetDistance, KernelDistance
from prefgen.testing.parity_case import SINGLE, ParityCase, gap, new_rng, owners, some_rows


def _win_rate() -> float:
    own, against = new_rng().integers(0, 3, (2, 12, 4)).astype(float)
    metric = WinRate()
    metric.update(*(torch.from_numpy(x.ravel()) for x in (own, against)), users=owners(12, each=4))
    expected = [
        sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(*pair, strict=True)) / 4
        for pair in zip(own.tolist(), against.tolist(), strict=True)
    ]
    return gap(metric.per_user(), expected)


def _margin() -> float:
    own, against = new_rng().normal(size=(2, 12, 4))
    metric = UtilityMargin()
    metric.update(*(torch.from_numpy(x.ravel()) for x in (own, against)), users=owners(12, each=4))
    return gap(metric.per_user(), (own - against).mean(axis=1))


def _hits() -> float:
    words = tuple("abcde")
    probabilities = some_rows(40, 5).softmax(dim=1)
    wanted = new_rng().integers(0, 5, 40)
    metric = AttributeHits(groups={"g": words}, judged=words)
    metric.update({"g": probabilities}, wanted=[[words[i]] for i in wanted], users=torch.zeros(40))
    published = multiclass_accuracy(probabilities, torch.from_numpy(wanted), num_classes=5, average="micro")
    return gap(metric.per_user()[0], published)


def _fidelity() -> float:
    names = tuple("abcde")
    probabilities = some_rows(40, 5, seed=1).softmax(dim=1)
    asked = new_rng().integers(0, 5, 40)
    metric = PromptFidelity(subjects=names, among=names)
    metric.update(probabilities, prompts=[names[i] for i in asked], users=torch.zeros(40))
    published = multiclass_accuracy(probabilities, torch.from_numpy(asked), num_classes=5, average="micro")
    return gap(metric.per_user()[0], published)


def _pair_cosine() -> float:
    first, second = some_rows(30, 8), some_rows(30, 8, seed=1)
    metric = PairCosine()
    metric.update(first, second, users=torch.arange(30))
    return gap(metric.per_user(), pairwise_cosine_similarity(first, second).diagonal())


def _history_likeness() -> float:
    pictures, liked = some_rows(30, 8), [some_rows(5, 8, seed=2 + i) for i in range(30)]
    metric = HistoryLikeness()
    metric.update(pictures, liked=liked, users=torch.arange(30))
    expected = [
        pairwise_cosine_similarity(one[None], own).mean() for one, own in zip(pictures, liked, strict=True)
    ]
    return gap(metric.per_user(), expected)


def _diversity() -> float:
    pictures = some_rows(30, 8)
    metric = UserDiversity()
    metric.update(pictures, users=owners(6, each=5))
    expected = []
    for own in pictures.reshape(6, 5, 8):
        cosines = pairwise_cosine_similarity(own, own)
        expected.append(1 - cosines[~torch.eye(5, dtype=torch.bool)].mean())
    return gap(metric.per_user(), expected)


def _nearest() -> float:
    pictures, history = some_rows(20, 3, 4, 4), some_rows(9, 3, 4, 4, seed=1)
    found = nearest_distances(pictures, histories=[history] * 20, distance="pixels")
    return gap(found, torch.cdist(pictures.flatten(1), history.flatten(1)).min(dim=1).values / 48**0.5)


def _two_clouds(*, width: int = 6) -> tuple[Tensor, Tensor]:
    first = some_rows(70, width) @ some_rows(width, width, seed=1) + 1
    return first, some_rows(50, width, seed=2) @ some_rows(width, width, seed=3)


def _frechet(first: Tensor, second: Tensor) -> float:
    metric = FrechetDistance(num_features=first.shape[1])
    for rows, real in ((first[:20], True), (first[20:], True), (second, False)):
        metric.update(rows, real=real)
    return float(metric.compute())


def _fid_closed() -> float:
    first, second = _two_clouds()
    a, b = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    mean = (first.mean(dim=0) - second.mean(dim=0)).pow(2).sum()
    return gap(_frechet(first, second), mean + a.trace() + b.trace() - 2 * cross)


def _fid_scipy() -> float:
    from scipy.linalg import sqrtm

    first, second = _two_clouds()
    a, b = (np.cov(rows.numpy(), rowvar=False) for rows in (first, second))
    mean = ((first.mean(dim=0) - second.mean(dim=0)) ** 2).sum().item()
    return gap(_frechet(first, second), mean + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


class _Identity(torch.nn.Module):
    num_features = 6

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def _kid() -> float:
    first, second = (rows[:50] for rows in _two_clouds())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it keeps all rows; so do we
        published = KernelInceptionDistance(_Identity(), subsets=1, subset_size=50)
    ours = KernelDistance()
    for rows, real in ((first, True), (second, False)):
        ours.update(rows, real=real)
        published.update(rows, real=real)
    value = published.compute()[0]
    return gap(ours.compute(), value) / max(1.0, abs(float(value)))


def _cmmd() -> float:
    first, second = _two_clouds()
    metric = CMMD()
    metric.update(x=first[:30])
    metric.update(x=first[30:], y=second)
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (first, second))

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b[None]).pow(2).sum(dim=-1) / (2 * 10.0**2)).mean()

    return gap(metric.compute(), 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


PICTURE_CASES: Sequence[ParityCase] = (
    ParityCase(metric="WinRate", reference="plain loops, ties half", largest=_win_rate),
    ParityCase(metric="UtilityMargin", reference="closed form", largest=_margin),
    ParityCase(
        metric="AttributeHits", reference="torchmetrics accuracy", largest=_hits, tolerance=SINGLE
    ),
    ParityCase(
        metric="PromptFidelity", reference="torchmetrics accuracy", largest=_fidelity, tolerance=SINGLE
    ),
    ParityCase(metric="PairCosine (CLIP-T)", reference="torchmetrics cosine", largest=_pair_cosine),
    ParityCase(
        metric="HistoryLikeness (CLIP-I, DINO)", reference="torchmetrics cosine", largest=_history_likeness
    ),
    ParityCase(metric="UserDiversity", reference="torchmetrics cosine", largest=_diversity),
    ParityCase(metric="HistoryDistance", reference="torch.cdist", largest=_nearest),
    ParityCase(metric="FrechetDistance (FID)", reference="closed form, eigh", largest=_fid_closed),
    ParityCase(
        metric="FrechetDistance (FID)", reference="scipy.linalg.sqrtm", largest=_fid_scipy, package="scipy",
        tolerance=1e-6,
    ),
    ParityCase(
        metric="KernelDistance (KID)", reference="torchmetrics KID, equal sizes", largest=_kid
    ),
    ParityCase(metric="CMMD", reference="plain sums of the paper's formula", largest=_cmmd),
)  # fmt: skip
"""In the order of the table."""
