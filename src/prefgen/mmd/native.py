"""The compiled epilogue of the CPU path: native.c through the system's C compiler, once per machine.

Compiling takes under a second and the library is kept in ``$XDG_CACHE_HOME/prefgen``. Without a compiler,
without a writable cache, with ``PREFGEN_MMD_NATIVE=0`` or if the library fails its self-check, plain torch
does the same work at a lower speed, and the log says so once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from prefgen.mmd.gemm import dots
from prefgen.mmd.tiled import Problem, Side, Sums, TiledPass, TileTask

log = logging.getLogger(__name__)

MAX_LEVELS = 64
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)


class _Tile(ctypes.Structure):
    """Mirror of prefgen_tile."""

    _fields_ = (
        ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("stride", ctypes.c_int64),
        ("levels", ctypes.c_int32), ("chain", ctypes.c_int32), ("mode", ctypes.c_int32), ("hollow",
        ctypes.c_int32), ("row", ctypes.c_void_p), ("column", ctypes.c_void_p),
        ("row_weight", ctypes.c_void_p), ("column_weight", ctypes.c_void_p),
        ("table", ctypes.c_void_p), ("total", ctypes.c_double),
        ("row_sum", ctypes.c_void_p), ("column_sum", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """Whether the compiled epilogue is in use, why, and what compiling it cost this process."""

    library: ctypes.CDLL | None
    reason: str
    compile_seconds: float


@functools.cache
def native_status() -> NativeStatus:
    """Load the library, compiling it if this machine has not done so before; never raises."""
    if os.environ.get("PREFGEN_MMD_NATIVE", "1") == "0":
        return NativeStatus(library=None, reason="switched off by PREFGEN_MMD_NATIVE=0", compile_seconds=0.0)
    if sys.platform != "linux":
        return NativeStatus(library=None, reason=f"not built on {sys.platform}", compile_seconds=0.0)
    started = time.perf_counter()
    try:
        library, reason = _load()
        failure = "" if _self_check(library) else "it failed its self-check"
    except (OSError, subprocess.SubprocessError) as error:
        library, failure = None, str(error).splitlines()[0]
    if library is None or failure:
        log.warning(
            "mmd: no compiled epilogue (%s); plain torch is used, slower by some 10 to 60 %%", failure
        )
        return NativeStatus(library=None, reason=failure, compile_seconds=0.0)
    return NativeStatus(library=library, reason=reason, compile_seconds=time.perf_counter() - started)


def _load() -> tuple[ctypes.CDLL, str]:
    source = files("prefgen.mmd").joinpath("native.c").read_text(encoding="utf-8")
    key = hashlib.sha256("\n".join((source, *_FLAGS, _machine())).encode()).hexdigest()[:16]
    folder = _cache_folder()
    target = folder / f"mmd-{key}.so"
    if target.is_file():
        return ctypes.CDLL(str(target)), f"loaded from {target.name}"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler found (cc, gcc or clang)")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        code, built = Path(scratch) / "native.c", Path(scratch) / "native.so"
        code.write_text(source, encoding="utf-8")
        command = [*compiler.split(), *_FLAGS, str(code), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        # Renamed into place, so that two processes starting together never load half a file.
        built.replace(target)
    return ctypes.CDLL(str(target)), f"compiled by {Path(compiler).name}"


def _machine() -> str:
    # A home directory is shared by unlike machines; -march=native code must not travel between them.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})) + platform.machine()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "prefgen"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="prefgen-"))


def _self_check(library: ctypes.CDLL) -> bool:
    """expm1 of a small tile against torch, and that NaN stays NaN."""
    tile = torch.linspace(-30.0, 12.0, 96).reshape(4, 24).contiguous()
    want = torch.expm1(tile.double())
    tile[3, 23] = torch.nan
    zeros = torch.zeros(24, dtype=torch.float64)
    table = torch.tensor([[0.5], [0.0], [1.0], [1.0]], dtype=torch.float64)
    # rate 1/2 around 0: t = rate * (0 - (0 + 0 - 2 s)) = s.
    call_tile(library, tile, zeros[:4], zeros, None, None, table, chain=False, mode=2, hollow=False)
    near = torch.allclose(tile.double().flatten()[:95], want.flatten()[:95], rtol=5e-7, atol=0.0)
    return near and bool(tile[3, 23].isnan())


def call_tile(
    library: ctypes.CDLL,
    tile: Tensor,
    row: Tensor,
    column: Tensor,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    table: Tensor,
    *,
    chain: bool,
    mode: int,
    hollow: bool,
    row_sum: Tensor | None = None,
    column_sum: Tensor | None = None,
) -> float:
    """Run the epilogue on a float32 tile in place; returns the weighted sum of the kernel values."""

    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    task = _Tile(
        tile.shape[0], tile.shape[1], tile.stride(0), table.shape[1], int(chain), mode, int(hollow),
        row.data_ptr(), column.data_ptr(), address(row_weight), address(column_weight), table.data_ptr(), 0.0,
        address(row_sum), address(column_sum),
    )  # fmt: skip
    library.prefgen_mmd_tile(ctypes.byref(task), ctypes.c_void_p(tile.data_ptr()))
    total: float = task.total
    return total


def fits_native(problem: Problem) -> bool:
    """Whether the compiled epilogue covers this problem: gaussian, single precision, on the CPU."""
    data = problem.data
    return (
        problem.kernel == "gaussian"
        and data.x.device.type == "cpu"
        and data.x.dtype == torch.float32
        and type(data.x) is Tensor
        and problem.levels.rate.shape[0] <= MAX_LEVELS
        and native_status().library is not None
    )


class NativePass(TiledPass):
    """TiledPass with the compiled epilogue."""

    def __init__(self, problem: Problem, *, tile: int) -> None:
        super().__init__(problem, tile=tile)
        library = native_status().library
        assert library is not None
        self.library = library
        self.totals = [0.0, 0.0, 0.0]
        scales = problem.form.scale.tolist()
        self.tables = []
        for term in range(3):
            table = self.table.clone()
            table[3] *= 4.0 * scales[term] * self.even[term]
            self.tables.append(table)

    def run(self) -> Sums:
        """All tiles; the totals live in Python floats until the end."""
        sums = super().run()
        sums.terms.copy_(torch.tensor(self.totals, dtype=torch.float64))
        return sums

    def visit(self, task: TileTask, left: Side, right: Side, row: Tensor, column: Tensor) -> None:
        """One tile: GEMM, epilogue in place, two GEMMs."""
        i, j = task.i, task.j
        tile = dots(left.rows[i], right.rows[j])
        cross = task.term == 2
        total = call_tile(
            self.library, tile, row[i], column[j],
            None if left.weights is None else left.weights[i],
            None if right.weights is None else right.weights[j],
            self.tables[task.term],
            chain=self.problem.chain,
            mode=1 if task.to_left or task.to_right else 0,
            hollow=task.hollow,
            row_sum=(left.cross if cross else left.own)[i] if task.to_left else None,
            column_sum=(right.cross if cross else right.own)[j] if task.to_right else None,
        )  # fmt: skip
        self.totals[task.term] += total * self.even[task.term] * task.times
        if task.to_left or task.to_right:
            self.multiply(task, left, right, tile)
