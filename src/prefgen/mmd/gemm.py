"""The two matrix products of the tiled path, through the fastest exact single-precision GEMM the CPU has.

torch's sgemm is MKL, which runs at half speed or less on processors of other makers; oneDNN, also inside
torch, does not (measured on an AMD EPYC with AVX-512, one thread: 215 against 98 GFLOP/s). Both are IEEE
single precision. ``PREFGEN_MMD_GEMM=mkl`` or ``onednn`` overrides the choice.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prefgen.mmd.errors import MMDError


@functools.cache
def cpu_gemm() -> str:
    """Either "onednn" or "mkl": a fixed rule, no measurement, so that results do not depend on the load.

    Raises:
        MMDError: the environment variable names something else.
    """
    asked = os.environ.get("PREFGEN_MMD_GEMM", "")
    if asked not in ("", "mkl", "onednn"):
        raise MMDError(f"PREFGEN_MMD_GEMM={asked!r} is not one of mkl, onednn")
    usable = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if asked:
        return asked if usable else "mkl"
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "onednn" if usable and wide else "mkl"


def _onednn(a: Tensor) -> bool:
    if a.device.type != "cpu" or a.dtype != torch.float32 or type(a) is not Tensor:
        return False
    # set_float32_matmul_precision("medium") would make oneDNN round the operands to bf16 behind our back.
    return cpu_gemm() == "onednn" and torch.get_float32_matmul_precision() == "highest"


def _linear(a: Tensor, weight: Tensor) -> Tensor:
    op: Any = torch.ops.mkldnn._linear_pointwise
    out: Tensor = op(a, weight, None, "none", [], "")
    return out


def dots(a: Tensor, b: Tensor) -> Tensor:
    """(I, D), (J, D) -> (I, J) inner products."""
    return _linear(a, b) if _onednn(a) else a @ b.T


def product(a: Tensor, rows: Tensor) -> Tensor:
    """(I, J) @ (J, D)."""
    return _linear(a, rows.T) if _onednn(a) else a @ rows


def subtract_product(total: Tensor, gains: Tensor, rows: Tensor, *, sign: float) -> None:
    """``total -= sign * gains @ rows`` in place; (I, D), (I, J), (J, D)."""
    if _onednn(gains):
        total.sub_(_linear(gains, rows.T), alpha=sign)
    else:
        total.addmm_(gains, rows, alpha=-sign)


@contextlib.contextmanager
def matmul_precision(precision: str, *, device: torch.device) -> Iterator[None]:
    """Hold cuBLAS to the asked precision: "tf32" and "bf16" allow TF32, everything else is exact.

    The global switch is put back afterwards; following it silently would turn a metric into a TF32 metric.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision in ("tf32", "bf16") else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
