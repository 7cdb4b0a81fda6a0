"""MMD^2 and the two-sample test of sets larger than memory: chunks of rows, read again for every chunk row.

The kernel matrix is visited in square chunks; each pass over the data serves one chunk of rows. Memory is a
few chunks, whatever the number of rows; the arithmetic is that of mmd2, and so is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.errors import DataError
from prefgen.mmd.bandwidth import DEFAULT_MULTIPLIERS, resolve_mixture
from prefgen.mmd.form import check_counts
from prefgen.mmd.kernels import KernelName, check_kernel, make_levels
from prefgen.mmd.moments import shift_rows
from prefgen.mmd.pairs import PairValues
from prefgen.mmd.two_sample import PermutationSums, TestResult, draw_labels

Source = Callable[[], Iterator[NDArray[np.floating]]]
"""Gives the rows of a set from the start, as arrays (n, D) of any size; called several times."""

Progress = Callable[[int, int], None]
"""Called with (pairs done, pairs in all)."""

CHUNK_ROWS = 2048
_MEDIAN_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What one pass over a set tells.

    Attributes:
        count: rows.
        mean: (D,) float64.
        spread: sum of squared distances from the mean.
        sample: up to 1024 evenly spaced rows, float32.
    """

    count: int
    mean: Tensor
    spread: float
    sample: Tensor


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Kernel and machine of a streamed comparison; meanings as in prefgen.mmd.mmd2.

    Attributes:
        kernel: one of prefgen.mmd.kernels.KERNELS.
        bandwidth: numbers, "mean" or "median".
        multipliers: factors on each sigma.
        alpha: exponent of rq.
        unit_norm: scale every row to length 1 first.
        device: where to compute.
        chunk_rows: rows held at a time.
    """

    kernel: KernelName = "gaussian"
    bandwidth: float | Sequence[float] | str = "median"
    multipliers: Sequence[float] | None = None
    alpha: float = 1.0
    unit_norm: bool = False
    device: str = "cpu"
    chunk_rows: int = CHUNK_ROWS


@dataclass(frozen=True, kw_only=True)
class StreamResult:
    """Value of a streamed comparison.

    Attributes:
        mmd2: unbiased or biased, as asked.
        xx: mean kernel value within x; yy within y; xy between.
        yy: see xx.
        xy: see xx.
        rows_x: number of rows.
        rows_y: see rows_x.
        sigma: bandwidths used.
    """

    mmd2: float
    xx: float
    yy: float
    xy: float
    rows_x: int
    rows_y: int
    sigma: tuple[float, ...]


def chunks(source: Source, options: StreamOptions, *, start: int = 0) -> Iterator[Tensor]:
    """The rows as float32 tensors of ``chunk_rows`` rows (the last one shorter), from chunk ``start`` on.

    Raises:
        DataError: arrays that are not matrices of one width, or values that are not finite.
    """
    size, held, count, width, number = options.chunk_rows, [], 0, None, 0
    for array in source():
        if array.ndim != 2 or (width is not None and array.shape[1] != width):
            raise DataError(f"rows must be (n, D) arrays of one width, got {array.shape} after width {width}")
        width = array.shape[1]
        while len(array):
            take = array[: size - count]
            held.append(take)
            count, array = count + len(take), array[len(take) :]
            if count == size:
                if number >= start:
                    yield _tensor(held, options)
                held, count, number = [], 0, number + 1
    if count and number >= start:
        yield _tensor(held, options)


def _tensor(parts: list[NDArray[np.floating]], options: StreamOptions) -> Tensor:
    joined = np.concatenate(parts).astype(np.float32, copy=False)
    if not np.isfinite(joined).all():
        raise DataError("rows contain NaN or infinity; rebuild the embeddings or leave those rows out")
    rows = torch.from_numpy(joined).to(options.device)
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-12) if options.unit_norm else rows


def measure(source: Source, options: StreamOptions) -> Moments:
    """Count, mean, spread and an evenly spaced sample in one pass.

    Raises:
        DataError: no rows.
    """
    count, mean, spread = 0, torch.zeros(()), 0.0
    sample: list[Tensor] = []
    stride = 1
    for rows in chunks(source, options):
        own_mean = rows.mean(0, dtype=torch.float64)
        own_spread = (rows - own_mean.float()).square().sum(dtype=torch.float64).item()
        total = count + len(rows)
        gap = own_mean - mean if count else own_mean
        spread += own_spread + (gap.square().sum().item() * count * len(rows) / total if count else 0.0)
        mean = own_mean if not count else mean + gap * (len(rows) / total)
        first = -count % stride
        sample += list(rows[first::stride].cpu())
        while len(sample) > 2 * _MEDIAN_ROWS:
            sample, stride = sample[::2], 2 * stride
        count = total
    if not count:
        raise DataError("no rows to compare: the set is empty")
    return Moments(count=count, mean=mean, spread=spread, sample=torch.stack(sample))


def _pairs(x: Moments, y: Moments, options: StreamOptions) -> tuple[PairValues, tuple[float, ...]]:
    """Kernel around the typical distance of the data, and its bandwidths."""
    check_kernel(options.kernel, alpha=options.alpha)
    if x.mean.shape != y.mean.shape:
        raise DataError(f"rows of x have {len(x.mean)} entries and rows of y {len(y.mean)}; they must agree")
    far = (x.mean - y.mean).square().sum().item()
    bandwidth = options.bandwidth
    multipliers = options.multipliers
    if bandwidth == "mean":
        # The exact mean distance from the moments; the sample would only estimate it.
        total = x.count + y.count
        squares = x.spread + y.spread + far * x.count * y.count / total
        mixture = resolve_mixture(
            torch.zeros(2, 1, device=options.device), torch.zeros(1, 1, device=options.device),
            bandwidth=torch.tensor((2.0 * squares / (total - 1)) ** 0.5),
            multipliers=multipliers if multipliers is not None else DEFAULT_MULTIPLIERS, coefs="mean",
        )  # fmt: skip
    else:
        sample_x, sample_y = x.sample.to(options.device), y.sample.to(options.device)
        mixture = resolve_mixture(
            sample_x, sample_y, bandwidth=bandwidth, multipliers=multipliers, coefs="mean"
        )
    typical = torch.tensor(x.spread / x.count + y.spread / y.count + 0.5 * far, dtype=torch.float64)
    levels = make_levels(
        options.kernel, mixture.sigma, mixture.coefs, alpha=options.alpha, typical=typical.to(options.device),
        chain=mixture.chain,
    )  # fmt: skip
    pairs = PairValues(levels=levels, kernel=options.kernel, alpha=options.alpha, chain=mixture.chain)
    return pairs, tuple(mixture.sigma.tolist())


@torch.no_grad()
def stream_mmd2(
    a: Source,
    b: Source,
    *,
    unbiased: bool = True,
    options: StreamOptions | None = None,
    progress: Progress | None = None,
) -> StreamResult:
    """MMD^2 of two sets of any size.

    Args:
        a: rows of x.
        b: rows of y.
        unbiased: leave i = j out of xx and yy.
        options: kernel, bandwidth, device.
        progress: called after every chunk.

    Raises:
        DataError: a set is empty, widths differ, or values are not finite.
    """
    options = options or StreamOptions()
    x, y = measure(a, options), measure(b, options)
    check_counts(x.count, y.count, estimator="unbiased" if unbiased else "biased")
    pairs, sigma = _pairs(x, y, options)
    mean_x, mean_y = x.mean.float(), y.mean.float()
    gap = mean_x.double() - mean_y.double()
    far = gap.square().sum()
    counter = _Counter(progress, (x.count**2 + y.count**2) // 2 + x.count * y.count)
    totals = [0.0, 0.0, 0.0]
    for index, own in enumerate(chunks(a, options)):
        rows, norm, along = shift_rows(own, mean_x, gap)
        for other_index, other in enumerate(chunks(a, options, start=index), index):
            same = other_index == index
            totals[0] += _own(pairs, rows, norm, other, mean_x, gap, same=same)
            counter.add(rows.shape[0] * other.shape[0] // (2 if same else 1))
        cross = norm + 2.0 * along + far
        for other in chunks(b, options):
            right, norm_y, along_y = shift_rows(other, mean_y, gap)
            totals[2] += pairs.total(rows, right, cross, norm_y - 2.0 * along_y, same=False).item()
            counter.add(rows.shape[0] * other.shape[0])
    for index, own in enumerate(chunks(b, options)):
        rows, norm, _ = shift_rows(own, mean_y, gap)
        for other_index, other in enumerate(chunks(b, options, start=index), index):
            same = other_index == index
            totals[1] += _own(pairs, rows, norm, other, mean_y, gap, same=same)
            counter.add(rows.shape[0] * other.shape[0] // (2 if same else 1))
    return _assemble(totals, pairs, x.count, y.count, sigma, unbiased=unbiased)


def _own(
    pairs: PairValues, rows: Tensor, norm: Tensor, other: Tensor, mean: Tensor, gap: Tensor, *, same: bool
) -> float:
    """Ordered pairs of two chunks of one set: a chunk with itself, or twice the sum of two different ones."""
    if same:
        return pairs.total(rows, rows, norm, norm, same=True).item()
    right, norm_right, _ = shift_rows(other, mean, gap)
    return 2.0 * pairs.total(rows, right, norm, norm_right, same=False).item()


def _assemble(
    totals: list[float], pairs: PairValues, n: int, m: int, sigma: tuple[float, ...], *, unbiased: bool
) -> StreamResult:
    constant = pairs.levels.constant.item()
    at_zero = 0.0 if pairs.kernel == "energy" else 1.0
    own = [
        total / (size * (size - 1)) if unbiased else (total + size * (at_zero - constant)) / size**2
        for total, size in ((totals[0], n), (totals[1], m))
    ]
    cross = totals[2] / (n * m)
    return StreamResult(
        mmd2=own[0] + own[1] - 2.0 * cross, xx=own[0] + constant, yy=own[1] + constant, xy=cross + constant,
        rows_x=n, rows_y=m, sigma=sigma,
    )  # fmt: skip


@torch.no_grad()
def stream_test(
    a: Source,
    b: Source,
    *,
    permutations: int = 200,
    seed: int = 0,
    options: StreamOptions | None = None,
    progress: Progress | None = None,
) -> TestResult:
    """Permutation two-sample test of two sets of any size; memory ``permutations * (N + M)`` bytes.

    Args:
        a: rows of x.
        b: rows of y.
        permutations: how many.
        seed: of the permutations.
        options: kernel, bandwidth, device.
        progress: called after every chunk.

    Raises:
        DataError: as stream_mmd2.
    """
    options = options or StreamOptions()
    x, y = measure(a, options), measure(b, options)
    check_counts(x.count, y.count, estimator="unbiased")
    pairs, _ = _pairs(x, y, options)
    total = x.count + y.count
    mean = ((x.mean * x.count + y.mean * y.count) / total).float()
    gap = torch.zeros_like(mean, dtype=torch.float64)
    labels = draw_labels(x.count, y.count, permutations=permutations, seed=seed).bool().to(options.device)
    sums = PermutationSums(labels)
    counter = _Counter(progress, total**2 // 2)

    def pooled() -> Iterator[NDArray[np.floating]]:
        yield from a()
        yield from b()

    first = 0
    for index, own in enumerate(chunks(pooled, options)):
        rows, norm, _ = shift_rows(own, mean, gap)
        i, at = slice(first, first + own.shape[0]), first
        for other_index, other in enumerate(chunks(pooled, options, start=index), index):
            right, norm_right, _ = shift_rows(other, mean, gap)
            j = slice(at, at + other.shape[0])
            same = other_index == index
            sums.add(pairs.tile(rows, right, norm, norm_right, hollow=same), i, j)
            counter.add(rows.shape[0] * other.shape[0] // (2 if same else 1))
            at = j.stop
        first = i.stop
    return sums.result()


class _Counter:
    """Adds up pairs for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, pairs: int) -> None:
        self.done += pairs
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
