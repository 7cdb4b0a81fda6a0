"""Every metric beside a published implementation or a closed form: the largest difference of each.

``tools/metric_parity.py`` prints the table; the tests hold each case to its tolerance.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional import pairwise_cosine_similarity
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.image.kid import KernelInceptionDistance

from prefgen.evaluate.agreement import Level, krippendorff_alpha
from prefgen.evaluate.alignment import bootstrap, neighbourhood_overlap
from prefgen.evaluate.comparing import holm, sign_flip_p
from prefgen.evaluate.copying import nearest_distances
from prefgen.evaluate.likeness import HistoryLikeness, PairCosine, UserDiversity
from prefgen.evaluate.preference import AttributeHits, PromptFidelity, UtilityMargin, WinRate
from prefgen.evaluate.set_distances import CMMD, FrechetDistance, KernelDistance
from prefgen.evaluate.strengths import bradley_terry
from prefgen.evaluate.structure import linear_cka, user_cosines

EXACT = 1e-9
SINGLE = 1e-5
"""Tolerances of float64 arithmetic, and of cases in which one side works in float32."""


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """One metric and what it is held against.

    Attributes:
        metric: its name.
        reference: what the other side is.
        largest: computes the largest difference over all cases tried.
        tolerance: what it must stay below.
        package: a package the reference needs beyond prefgen's own; empty for none.
    """

    metric: str
    reference: str
    largest: Callable[[], float]
    tolerance: float = EXACT
    package: str = ""

    @property
    def can_run(self) -> bool:
        """Whether the reference is installed."""
        return not self.package or find_spec(self.package) is not None


def _rng() -> np.random.Generator:
    return np.random.default_rng(17)


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _users(count: int, *, each: int) -> Tensor:
    return torch.arange(count).repeat_interleave(each)


def _gap(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)).max())


def _win_rate() -> float:
    own, against = _rng().integers(0, 3, (2, 12, 4)).astype(float)
    metric = WinRate()
    metric.update(*(torch.from_numpy(x.ravel()) for x in (own, against)), users=_users(12, each=4))
    expected = [
        sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(*pair, strict=True)) / 4
        for pair in zip(own.tolist(), against.tolist(), strict=True)
    ]
    return _gap(metric.per_user(), expected)


def _margin() -> float:
    own, against = _rng().normal(size=(2, 12, 4))
    metric = UtilityMargin()
    metric.update(*(torch.from_numpy(x.ravel()) for x in (own, against)), users=_users(12, each=4))
    return _gap(metric.per_user(), (own - against).mean(axis=1))


def _hits() -> float:
    words = tuple("abcde")
    probabilities = _rows(40, 5).softmax(dim=1)
    wanted = _rng().integers(0, 5, 40)
    metric = AttributeHits(groups={"g": words}, judged=words)
    metric.update({"g": probabilities}, wanted=[[words[i]] for i in wanted], users=torch.zeros(40))
    published = multiclass_accuracy(probabilities, torch.from_numpy(wanted), num_classes=5, average="micro")
    return _gap(metric.per_user()[0], published)


def _fidelity() -> float:
    names = tuple("abcde")
    probabilities = _rows(40, 5, seed=1).softmax(dim=1)
    asked = _rng().integers(0, 5, 40)
    metric = PromptFidelity(subjects=names, among=names)
    metric.update(probabilities, prompts=[names[i] for i in asked], users=torch.zeros(40))
    published = multiclass_accuracy(probabilities, torch.from_numpy(asked), num_classes=5, average="micro")
    return _gap(metric.per_user()[0], published)


def _pair_cosine() -> float:
    first, second = _rows(30, 8), _rows(30, 8, seed=1)
    metric = PairCosine()
    metric.update(first, second, users=torch.arange(30))
    return _gap(metric.per_user(), pairwise_cosine_similarity(first, second).diagonal())


def _history_likeness() -> float:
    pictures, liked = _rows(30, 8), [_rows(5, 8, seed=2 + i) for i in range(30)]
    metric = HistoryLikeness()
    metric.update(pictures, liked=liked, users=torch.arange(30))
    expected = [
        pairwise_cosine_similarity(one[None], own).mean() for one, own in zip(pictures, liked, strict=True)
    ]
    return _gap(metric.per_user(), expected)


def _diversity() -> float:
    pictures = _rows(30, 8)
    metric = UserDiversity()
    metric.update(pictures, users=_users(6, each=5))
    expected = []
    for own in pictures.reshape(6, 5, 8):
        cosines = pairwise_cosine_similarity(own, own)
        expected.append(1 - cosines[~torch.eye(5, dtype=torch.bool)].mean())
    return _gap(metric.per_user(), expected)


def _nearest() -> float:
    pictures, history = _rows(20, 3, 4, 4), _rows(9, 3, 4, 4, seed=1)
    found = nearest_distances(pictures, histories=[history] * 20, distance="pixels")
    return _gap(found, torch.cdist(pictures.flatten(1), history.flatten(1)).min(dim=1).values / 48**0.5)


def _two_clouds(*, width: int = 6) -> tuple[Tensor, Tensor]:
    first = _rows(70, width) @ _rows(width, width, seed=1) + 1
    return first, _rows(50, width, seed=2) @ _rows(width, width, seed=3)


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
    return _gap(_frechet(first, second), mean + a.trace() + b.trace() - 2 * cross)


def _fid_scipy() -> float:
    from scipy.linalg import sqrtm

    first, second = _two_clouds()
    a, b = (np.cov(rows.numpy(), rowvar=False) for rows in (first, second))
    mean = ((first.mean(dim=0) - second.mean(dim=0)) ** 2).sum().item()
    return _gap(_frechet(first, second), mean + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


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
    return _gap(ours.compute(), value) / max(1.0, abs(float(value)))


def _cmmd() -> float:
    first, second = _two_clouds()
    metric = CMMD()
    metric.update(x=first[:30])
    metric.update(x=first[30:], y=second)
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (first, second))

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b[None]).pow(2).sum(dim=-1) / (2 * 10.0**2)).mean()

    return _gap(metric.compute(), 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


def _bootstrap() -> float:
    values = np.array([0.1, 0.4, 0.5, 0.9, 1.0])
    means = [np.mean(rows) for rows in itertools.product(values, repeat=5)]
    found = bootstrap(values, seed=3, draws=200_000)
    return _gap([found.low, found.high], np.quantile(means, [0.025, 0.975]))


def _sign_flip_closed() -> float:
    cases = [_gap(sign_flip_p(np.full(n, 0.3)), 2.0 / 2**n) for n in range(1, 12)]
    return max(cases)


def _sign_flip_scipy() -> float:
    from scipy.stats import permutation_test

    gaps = []
    for count in (5, 8, 11):
        values = _rng().normal(0.4, 1, count)
        found = permutation_test(
            (values,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf,
            vectorized=True,
        )  # fmt: skip
        gaps.append(_gap(sign_flip_p(values), found.pvalue))
    return max(gaps)


def _holm() -> float:
    """Closed testing with Bonferroni: p of i is the largest, over families with i, of its corrected least."""
    values = [0.001, 0.04, 0.03, 0.2, 0.011, 0.9]
    expected = [0.0] * len(values)
    for size in range(1, len(values) + 1):
        for family in itertools.combinations(range(len(values)), size):
            p = min(1.0, size * min(values[i] for i in family))
            for i in family:
                expected[i] = max(expected[i], p)
    return _gap(holm(values), expected)


def _wins(count: int = 5) -> NDArray[np.float64]:
    wins = _rng().integers(1, 20, (count, count)).astype(float)
    np.fill_diagonal(wins, 0)
    return wins


def _bradley_closed() -> float:
    found = bradley_terry(np.array([[0.0, 7.0], [3.0, 0.0]]), prior_ties=0)
    return _gap(found[0] - found[1], np.log(7 / 3))


def _bradley_sklearn() -> float:
    from sklearn.linear_model import LogisticRegression

    wins = _wins()
    rows, outcome, weight = [], [], []
    for i, j in itertools.permutations(range(len(wins)), 2):
        row = np.zeros(len(wins))
        row[i], row[j] = 1, -1
        rows += [row, row]
        outcome += [1, 0]
        weight += [wins[i, j], wins[j, i]]
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cg")
    model.fit(np.stack(rows), outcome, sample_weight=weight)
    strengths = model.coef_[0] - model.coef_[0].mean()
    return _gap(bradley_terry(wins, prior_ties=0), strengths)


_NONE = float("nan")
PUBLISHED_ANSWERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _NONE, _NONE, _NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _NONE, 3],
        [_NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _NONE],
    ]
)
"""The example of Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D."""


def _alpha_published() -> float:
    expected: dict[Level, float] = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}
    return max(
        _gap(krippendorff_alpha(PUBLISHED_ANSWERS, level=level), value) for level, value in expected.items()
    )


def _alpha_package() -> float:
    import krippendorff

    gaps = []
    for level in get_args(Level):
        for data in (PUBLISHED_ANSWERS, _rng().integers(0, 3, (5, 40)).astype(float)):
            theirs = krippendorff.alpha(reliability_data=data, level_of_measurement=level)
            gaps.append(_gap(krippendorff_alpha(data, level=level), theirs))
    return max(gaps)


def _cka() -> float:
    first, second = _rows(40, 5), _rows(40, 7, seed=1)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, l = (centre @ (rows @ rows.T) @ centre for rows in (first, second))  # noqa: E741 - the paper's names
    return _gap(linear_cka(first, second), (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


def _cosines() -> float:
    draws = [_rows(3, 5, seed=i) for i in range(4)]
    rows = torch.cat(draws)
    cosines = pairwise_cosine_similarity(rows - rows.mean(dim=0), rows - rows.mean(dim=0))
    owner = _users(4, each=3)
    same = owner[:, None] == owner[None]
    found = user_cosines(draws, seed=0)
    within = cosines[same & ~torch.eye(12, dtype=torch.bool)].mean()
    return _gap([found.within.mean, found.between.mean], [within, cosines[~same].mean()])


def _neighbours() -> float:
    from sklearn.neighbors import NearestNeighbors

    first, second = _rows(40, 5), _rows(40, 7, seed=1)
    near = [NearestNeighbors(n_neighbors=6).fit(rows).kneighbors(return_distance=False)
            for rows in (first.numpy(), second.numpy())]  # fmt: skip
    shares = [len(set(a) & set(b)) / 6 for a, b in zip(*near, strict=True)]
    return _gap(neighbourhood_overlap(first, second, num_neighbours=6), np.mean(shares))


CASES: Sequence[ParityCase] = (
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
    ParityCase(
        metric="bootstrap interval", reference="all 3125 resamplings", largest=_bootstrap, tolerance=5e-3
    ),
    ParityCase(metric="sign-flip test", reference="closed form 2^(1-n)", largest=_sign_flip_closed),
    ParityCase(
        metric="sign-flip test", reference="scipy.stats.permutation_test", largest=_sign_flip_scipy,
        package="scipy",
    ),
    ParityCase(metric="Holm correction", reference="closed testing, all families", largest=_holm),
    ParityCase(metric="Bradley-Terry", reference="closed form for two", largest=_bradley_closed),
    ParityCase(
        metric="Bradley-Terry", reference="scikit-learn logistic regression", largest=_bradley_sklearn,
        package="sklearn", tolerance=1e-6,
    ),
    ParityCase(
        metric="Krippendorff's alpha", reference="published example, 3 digits", largest=_alpha_published,
        tolerance=5e-4 + 1e-9,
    ),
    ParityCase(
        metric="Krippendorff's alpha", reference="package krippendorff", largest=_alpha_package,
        package="krippendorff",
    ),
    ParityCase(metric="linear CKA", reference="Gram form, HSIC", largest=_cka),
    ParityCase(metric="user cosines", reference="torchmetrics cosine", largest=_cosines),
    ParityCase(
        metric="neighbourhood overlap", reference="scikit-learn NearestNeighbors", largest=_neighbours,
        package="sklearn",
    ),
)  # fmt: skip
"""All of them, in the order of the table."""
