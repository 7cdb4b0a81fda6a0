"""Which backend computes, and why: one rule, an argument, an environment variable, one log line."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch

from prefgen.mmd.errors import MMDError
from prefgen.mmd.gemm import cpu_gemm
from prefgen.mmd.native import native_status
from prefgen.mmd.spec import BACKENDS, PRECISIONS, Spec

log = logging.getLogger(__name__)

CPU_TILE = 512
GPU_TILE = 4096
"""Rows of a tile: the CPU's stays in its cache, the GPU's panel of 4096 x 4096 slopes takes 64 MB."""

DENSE_PAIRS = 512 * 512
_TRITON_MIN_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A decision and its reason.

    Attributes:
        backend: "tiled", "dense" or "triton".
        tile: rows of a tile (of the panel, for triton).
        precision: how GEMM operands are treated; always "ieee" on a CPU.
        reason: for the log and for ``prefgen doctor``.
    """

    backend: str
    tile: int
    precision: str
    reason: str


@functools.cache
def triton_problem() -> str:
    """Why the Triton path cannot be used on this machine; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'prefgen[triton]')"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return ""


def choose(
    *,
    device: torch.device,
    dtype: torch.dtype,
    rows: tuple[int, int],
    width: int,
    spec: Spec,
    blocks: int = 0,
) -> Choice:
    """The rule: blocks -> dense; CPU -> tiled; CUDA: small -> dense, sm80+ -> triton, else tiled.

    ``backend=`` comes before the environment variable ``PREFGEN_MMD_BACKEND``, and that before the rule.

    Raises:
        MMDError: an unknown name, or Triton asked for where it cannot run.
    """
    if spec.precision not in PRECISIONS:
        raise MMDError(f"precision: {spec.precision!r} is not one of {', '.join(PRECISIONS)}")
    asked, origin = spec.backend, "asked for"
    if asked == "auto":
        asked = os.environ.get("PREFGEN_MMD_BACKEND", "auto")
        origin = "set by PREFGEN_MMD_BACKEND"
    if asked not in BACKENDS:
        raise MMDError(f"backend: {asked!r} is not one of {', '.join(BACKENDS)}")
    if blocks:
        return _choice("dense", device, spec, "blocks are computed as a batch")
    if asked == "triton":
        refusal = _triton_refusal(device, dtype, width, spec.kernel)
        if refusal:
            raise MMDError(f"backend='triton' cannot be used here: {refusal}; leave backend='auto'")
    if asked != "auto":
        return _choice(asked, device, spec, origin)
    if device.type != "cuda":
        return _choice("tiled", device, spec, f"{device.type} tensors")
    if rows[0] * rows[1] <= DENSE_PAIRS and max(rows) <= 1024:
        return _choice("dense", device, spec, "a small problem is one tile")
    refusal = _triton_refusal(device, dtype, width, spec.kernel)
    return (
        _choice("tiled", device, spec, refusal)
        if refusal
        else _choice("triton", device, spec, "sm80 or newer")
    )


def _choice(backend: str, device: torch.device, spec: Spec, reason: str) -> Choice:
    precision = spec.precision
    if precision == "auto":
        precision = "tf32x3" if spec.need_x or spec.need_y else "ieee"
    if device.type == "cpu" or (backend != "triton" and precision == "tf32x3"):
        precision = "ieee"
    return Choice(
        backend=backend,
        tile=spec.tile or (GPU_TILE if device.type == "cuda" else CPU_TILE),
        precision=precision,
        reason=reason,
    )


def _triton_refusal(device: torch.device, dtype: torch.dtype, width: int, kernel: str) -> str:
    if device.type != "cuda":
        return f"tensors on {device.type}"
    if triton_problem():
        return triton_problem()
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability below 8.0 (Triton emits no tensor-core code there)"
    if kernel != "gaussian":
        return f"no Triton kernel for {kernel!r}"
    if dtype == torch.float64:
        return "float64"
    return f"D={width} is below {_TRITON_MIN_WIDTH}" if width < _TRITON_MIN_WIDTH else ""


_logged: set[tuple[str, str]] = set()


def log_once(choice: Choice) -> None:
    """Say once per process which backend is used and why."""
    key = (choice.backend, choice.reason)
    if key in _logged or torch.compiler.is_compiling():
        return
    _logged.add(key)
    log.info(
        "mmd: backend %s, tile %d, precision %s (%s)",
        choice.backend,
        choice.tile,
        choice.precision,
        choice.reason,
    )


def describe_backend() -> list[str]:
    """Lines for ``prefgen doctor``: what would be used on this machine, and why."""
    native = native_status()
    lines = [
        f"CPU: tiled, tile {CPU_TILE}, GEMM {cpu_gemm()}, epilogue "
        + (f"compiled ({native.reason})" if native.library is not None else f"plain torch ({native.reason})"),
    ]
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        usable = not triton_problem() and capability >= (8, 0)
        why = triton_problem() or f"compute capability {capability[0]}.{capability[1]}"
        lines.append(f"CUDA: {'triton' if usable else 'tiled torch with cuBLAS'}, tile {GPU_TILE} ({why})")
    else:
        lines.append(f"CUDA: not available; Triton: {triton_problem() or 'ready'}")
    override = os.environ.get("PREFGEN_MMD_BACKEND")
    if override:
        lines.append(f"PREFGEN_MMD_BACKEND={override} overrides the rule")
    return lines
