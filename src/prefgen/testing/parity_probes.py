"""The solved probes beside scikit-learn's on the same standardised features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefgen.models.probe_solvers import RidgeSums, fit_logistic, solve_grid
from prefgen.testing.parity_case import ParityCase, gap, some_rows

L2 = 0.03


def _problem(num_classes: int, *, count: int = 90, dim: int = 7) -> tuple[Tensor, Tensor]:
    """Standardised features (N, D) that say something about labels (N,)."""
    labels = torch.arange(count) % num_classes
    rows = some_rows(count, dim) + 0.8 * some_rows(num_classes, dim, seed=1)[labels]
    return (rows - rows.mean(0)) / rows.std(0, correction=0), labels


def _ridge() -> float:
    from sklearn.linear_model import Ridge

    gaps = []
    for num_classes in (2, 5):
        rows, labels = _problem(num_classes)
        rows = rows + 0.5  # the intercept counts too
        sums = RidgeSums(num_cells=1, dim=rows.shape[1], num_classes=num_classes)
        for start in range(0, len(rows), 16):
            sums.add(rows[start : start + 16, None], labels=labels[start : start + 16, None])
        ours = sums.solve(l2=L2)
        theirs = Ridge(alpha=L2 * len(rows)).fit(rows.numpy(), np.eye(num_classes)[labels.numpy()])
        gaps += [gap(ours.weight[0], theirs.coef_), gap(ours.bias[0], theirs.intercept_)]
    return max(gaps)


def _logistic() -> float:
    from sklearn.linear_model import LogisticRegression

    gaps = []
    for num_classes in (2, 5):
        rows, labels = _problem(num_classes)
        ours = fit_logistic(rows, labels=labels, num_classes=num_classes, l2=L2)
        # For two classes scikit-learn penalises the difference of the two rows, half as strongly.
        strength = (2 if num_classes == 2 else 1) / (L2 * len(rows))
        model = LogisticRegression(C=strength, tol=1e-12, max_iter=10_000, solver="newton-cg")
        model.fit(rows.numpy(), labels.numpy())
        logits = (rows @ ours.weight[0].T + ours.bias[0]).softmax(-1)
        gaps.append(gap(logits, model.predict_proba(rows.numpy())))
    return max(gaps)


def _guesses() -> float:
    """Share of held-out samples on which a whole grid and scikit-learn's pipeline differ."""
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = torch.arange(400) % 5
    rows = (some_rows(400, 3, 7) + 0.6 * some_rows(5, 3, 7, seed=1)[labels]) * torch.tensor([1, 5, 0.1])[
        :, None
    ]
    train, test = rows[:200].half(), rows[200:].half()
    differing = []
    solvers: tuple[tuple[Literal["ridge", "logistic"], Any], ...] = (
        ("ridge", RidgeClassifier(alpha=L2 * 200)),
        ("logistic", LogisticRegression(C=1 / (L2 * 200), tol=1e-8, max_iter=10_000)),
    )
    for kind, model in solvers:
        grid = solve_grid(kind, train, labels=labels[:200], num_classes=5, l2=L2)
        ours = grid(test).argmax(-1).numpy()
        for cell in range(3):
            scaled = make_pipeline(StandardScaler(), model)
            scaled.fit(train[:, cell].double().numpy(), labels[:200].numpy())
            differing.append(float((scaled.predict(test[:, cell].double().numpy()) != ours[:, cell]).mean()))
    return max(differing)


PROBE_CASES: Sequence[ParityCase] = (
    ParityCase(metric="ridge probe", reference="scikit-learn Ridge", largest=_ridge, package="sklearn"),
    ParityCase(
        metric="logistic probe", reference="scikit-learn LogisticRegression", largest=_logistic,
        package="sklearn", tolerance=1e-5,
    ),
    ParityCase(
        metric="guesses of a grid", reference="scikit-learn's pipelines", largest=_guesses, package="sklearn",
    ),
)  # fmt: skip
"""In the order of the table."""
