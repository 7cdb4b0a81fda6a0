"""Intervals, tests, ratings, agreement and structure beside their references."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional import pairwise_cosine_similarity

from prefgen.evaluate.agreement import Level, krippendorff_alpha
from prefgen.evaluate.alignment import bootstrap, neighbourhood_overlap
from prefgen.evaluate.comparing import holm, sign_flip_p
from prefgen.evaluate.strengths import bradley_terry
from prefgen.evaluate.structure import linear_cka, user_cosines
from prefgen.testing.parity_case import ParityCase, gap, new_rng, owners, some_rows


def _bootstrap() -> float:
    values = np.array([0.1, 0.4, 0.5, 0.9, 1.0])
    means = [np.mean(rows) for rows in itertools.product(values, repeat=5)]
    found = bootstrap(values, seed=3, draws=200_000)
    return gap([found.low, found.high], np.quantile(means, [0.025, 0.975]))


def _sign_flip_closed() -> float:
    cases = [gap(sign_flip_p(np.full(n, 0.3)), 2.0 / 2**n) for n in range(1, 12)]
    return max(cases)


def _sign_flip_scipy() -> float:
    from scipy.stats import permutation_test

    gaps = []
    for count in (5, 8, 11):
        values = new_rng().normal(0.4, 1, count)
        found = permutation_test(
            (values,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf,
            vectorized=True,
        )  # fmt: skip
        gaps.append(gap(sign_flip_p(values), found.pvalue))
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
    return gap(holm(values), expected)


def _wins(count: int = 5) -> NDArray[np.float64]:
    wins = new_rng().integers(1, 20, (count, count)).astype(float)
    np.fill_diagonal(wins, 0)
    return wins


def _bradley_closed() -> float:
    found = bradley_terry(np.array([[0.0, 7.0], [3.0, 0.0]]), prior_ties=0)
    return gap(found[0] - found[1], np.log(7 / 3))


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
    return gap(bradley_terry(wins, prior_ties=0), strengths)


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
        gap(krippendorff_alpha(PUBLISHED_ANSWERS, level=level), value) for level, value in expected.items()
    )


def _alpha_package() -> float:
    import krippendorff

    gaps = []
    for level in get_args(Level):
        for data in (PUBLISHED_ANSWERS, new_rng().integers(0, 3, (5, 40)).astype(float)):
            theirs = krippendorff.alpha(reliability_data=data, level_of_measurement=level)
            gaps.append(gap(krippendorff_alpha(data, level=level), theirs))
    return max(gaps)


def _cka() -> float:
    first, second = some_rows(40, 5), some_rows(40, 7, seed=1)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, l = (centre @ (rows @ rows.T) @ centre for rows in (first, second))  # noqa: E741 - the paper's names
    return gap(linear_cka(first, second), (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


def _cosines() -> float:
    draws = [some_rows(3, 5, seed=i) for i in range(4)]
    rows = torch.cat(draws)
    cosines = pairwise_cosine_similarity(rows - rows.mean(dim=0), rows - rows.mean(dim=0))
    owner = owners(4, each=3)
    same = owner[:, None] == owner[None]
    found = user_cosines(draws, seed=0)
    within = cosines[same & ~torch.eye(12, dtype=torch.bool)].mean()
    return gap([found.within.mean, found.between.mean], [within, cosines[~same].mean()])


def _neighbours() -> float:
    from sklearn.neighbors import NearestNeighbors

    first, second = some_rows(40, 5), some_rows(40, 7, seed=1)
    near = [NearestNeighbors(n_neighbors=6).fit(rows).kneighbors(return_distance=False)
            for rows in (first.numpy(), second.numpy())]  # fmt: skip
    shares = [len(set(a) & set(b)) / 6 for a, b in zip(*near, strict=True)]
    return gap(neighbourhood_overlap(first, second, num_neighbours=6), np.mean(shares))


STATISTIC_CASES: Sequence[ParityCase] = (
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
"""In the order of the table."""
