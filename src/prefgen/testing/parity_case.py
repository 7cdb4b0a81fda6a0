"""What a parity case is, and what the cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def new_rng() -> np.random.Generator:
    """The same numbers each time."""
    return np.random.default_rng(17)


def some_rows(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def owners(count: int, *, each: int) -> Tensor:
    """``count`` users with ``each`` pictures: the number of each picture's."""
    return torch.arange(count).repeat_interleave(each)


def gap(first: Any, second: Any) -> float:
    """The largest absolute difference of two numbers or arrays."""
    return float(np.abs(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)).max())
