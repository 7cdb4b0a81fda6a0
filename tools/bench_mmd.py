"""Speed, memory and accuracy of prefgen.mmd against the GEMM floor, dense autograd and geomloss.

    python tools/bench_mmd.py --quick                 # a minute, small sizes
    python tools/bench_mmd.py --json bench.json       # everything; about half an hour on one thread
    python tools/bench_mmd.py --device cuda           # the same on a GPU (CUDA events instead of CPU time)

Times are CPU time of this process on one thread, so other processes disturb them little; still every run of
a row is interleaved with a run of the GEMM peak and of the competitors, and medians are taken. The floor is
the arithmetic that any method needs, n = N + M: 3 D n^2 for both gradients, D n^2 + 2 D N n for one, D n^2
for the value, at the rate of torch.mm (1024 x 1024 x 768) measured in the same minute. Memory is the peak
rise of a child process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from prefgen.mmd import cmmd, describe_backend, mmd2, mmd_test
from prefgen.mmd.dispatch import choose
from prefgen.mmd.native import native_status
from prefgen.mmd.small import SMALL_ROWS
from prefgen.mmd.spec import Spec

FACTORS = (2.0, 2**0.5, 1.0, 2**-0.5, 0.5)
MODES = ("both", "x", "value")
SIZES = ((64, 768), (256, 768), (1024, 768), (4096, 768), (4096, 1280), (4096, 2048), (16384, 768))
QUICK = ((16, 768), (64, 768), (256, 768), (1024, 768))

Row = dict[str, object]


def sigmas(width: int, levels: int) -> list[float]:
    """Bandwidths around the typical distance of standard normal rows."""
    middle = (2.0 * width) ** 0.5
    return [middle * factor for factor in (FACTORS if levels == 5 else (1.0,))]


def dense_mmd2(x: Tensor, y: Tensor, widths: list[float]) -> Tensor:
    """The usual code: three Gram matrices, a list of bandwidths, autograd."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2.0 * (a @ b.T)
        squared = squared.clamp_min(0.0)
        return sum(torch.exp(squared * (-0.5 / s**2)) for s in widths).mean() / len(widths)

    return mean_kernel(x, x) + mean_kernel(y, y) - 2.0 * mean_kernel(x, y)


def geomloss_mmd2(x: Tensor, y: Tensor, widths: list[float]) -> Tensor:
    """The tensorized gaussian loss of geomloss; it returns half of MMD^2. One bandwidth."""
    from geomloss import SamplesLoss

    loss: Tensor = 2.0 * SamplesLoss("gaussian", blur=widths[0], backend="tensorized")(x, y)
    return loss


def ours_mmd2(x: Tensor, y: Tensor, widths: list[float]) -> Tensor:
    """prefgen.mmd."""
    return mmd2(x, y, bandwidth=widths)


METHODS: dict[str, Callable[[Tensor, Tensor, list[float]], Tensor]] = {
    "ours": ours_mmd2,
    "dense": dense_mmd2,
    "geomloss": geomloss_mmd2,
}


def make_rows(count: int, width: int, *, device: str, mode: str) -> tuple[Tensor, Tensor]:
    """Two normal clouds, a little apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator).to(device)
    y = (torch.randn(count, width, generator=generator) + 0.05).to(device)
    return x.requires_grad_(mode != "value"), y.requires_grad_(mode == "both")


def step(method: str, x: Tensor, y: Tensor, widths: list[float]) -> None:
    """One forward pass, and backward where a gradient is wanted."""
    x.grad = y.grad = None
    value = METHODS[method](x, y, widths)
    if value.requires_grad:
        value.backward()


def timed(work: Callable[[], object], *, device: str) -> float:
    """Seconds: CPU time of the process, or time on the GPU."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    started = time.process_time()
    work()
    return time.process_time() - started


class Peak:
    """The GEMM rate: torch.mm of 1024 x 1024 x 768 (8192 x 8192 x 1024 on a GPU) in single precision."""

    def __init__(self, device: str) -> None:
        side, depth = (8192, 1024) if device == "cuda" else (1024, 768)
        self.device = device
        self.a, self.b = torch.randn(side, depth, device=device), torch.randn(side, depth, device=device)
        self.flops = 2.0 * side * side * depth
        self.once()

    def once(self) -> float:
        """Flop per second of one run."""
        return self.flops / timed(lambda: self.a @ self.b.T, device=self.device)


def floor_flops(count: int, width: int, mode: str) -> float:
    """Arithmetic no method can avoid, N = M = count."""
    total = 2.0 * count
    factor = {"both": 3.0 * total, "x": total + 2.0 * count, "value": total}[mode]
    return width * total * factor


def fits(method: str, count: int, width: int, levels: int, mode: str) -> bool:
    """Whether a dense method stays within 60 % of the free memory."""
    if method == "ours":
        return True
    kept = (2 * levels + 4) if mode != "value" else 5
    need = 3.0 * kept * count * count * 4 + 8.0 * count * width * 4
    return need < 0.6 * free_bytes()


def free_bytes() -> float:
    """Memory available to a new process."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    return float("inf")


def describe(count: int, width: int, levels: int, mode: str, device: str) -> str:
    """Backend and tile that prefgen.mmd uses for this row."""
    spec = Spec(kernel="gaussian", alpha=1.0, chain=levels > 1, estimator="biased", terms=(1.0, 1.0, 1.0),
                need_x=mode != "value", need_y=mode == "both")  # fmt: skip
    choice = choose(
        device=torch.device(device), dtype=torch.float32, rows=(count, count), width=width, spec=spec
    )
    if device == "cpu" and 2 * count <= SMALL_ROWS and native_status().library is not None:
        return "small, one tile"
    return f"{choice.backend}, tile {choice.tile}" + ("" if device == "cpu" else f", {choice.precision}")


def bench_row(
    count: int, width: int, levels: int, mode: str, *, device: str, reps: int, peak: Peak, memory: bool
) -> Row:
    """All methods of one setting, interleaved."""
    widths = sigmas(width, levels)
    x, y = make_rows(count, width, device=device, mode=mode)
    skipped = {}
    if levels > 1:
        skipped["geomloss"] = "one bandwidth only"
    for method in ("dense", "geomloss"):
        if not fits(method, count, width, levels, mode):
            skipped[method] = "would not fit in memory"
    methods = [method for method in METHODS if method not in skipped]
    if "geomloss" in methods and not has_geomloss():
        methods.remove("geomloss")
        skipped["geomloss"] = "not installed"
    times: dict[str, list[float]] = {method: [] for method in methods}
    rates = []
    # Short work is repeated within a run: one sample must last some milliseconds.
    inner = max(1, min(50, int(2e9 / floor_flops(count, width, mode))))
    for rep in range(reps + 1):
        rates.append(peak.once())
        for method in methods:
            seconds = (
                timed(lambda m=method: [step(m, x, y, widths) for _ in range(inner)], device=device) / inner
            )
            if rep:
                times[method].append(seconds)
    rate = median(rates)
    medians = {method: median(values) for method, values in times.items()}
    floor = floor_flops(count, width, mode) / rate
    row: Row = {
        "n": count, "d": width, "levels": levels, "mode": mode, "backend": describe(count, width, levels,
        mode, device), "peak_gflops": rate / 1e9, "floor_s": floor, "seconds": medians, "ratio_to_floor":
        medians["ours"] / floor, "faster_than": {m: medians[m] / medians["ours"] for m in medians if m !=
        "ours"}, "skipped": skipped,
    }  # fmt: skip
    if memory and device == "cpu":
        row["input_mb"] = 2 * count * width * 4 / 2**20
        row["memory_mb"] = {m: child_memory(m, count, width, levels, mode) for m in methods}
    return row


def has_geomloss() -> bool:
    """Whether the optional competitor is installed."""
    try:
        import geomloss  # noqa: F401
    except ImportError:
        return False
    return True


def child_memory(method: str, count: int, width: int, levels: int, mode: str) -> float:
    """Peak rise of resident memory of one step, in MiB, measured in a fresh process."""
    task = json.dumps([method, count, width, levels, mode])
    done = subprocess.run(
        [sys.executable, __file__, "--child", task], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def run_child(task: str) -> None:
    """Warm up on a small problem, then measure one step."""
    method, count, width, levels, mode = json.loads(task)
    torch.set_num_threads(1)
    small = make_rows(300, width, device="cpu", mode=mode)
    step(method, *small, sigmas(width, levels))
    del small
    x, y = make_rows(count, width, device="cpu", mode=mode)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kilobytes(status, "VmRSS")
    step(method, x, y, sigmas(width, levels))
    print((_kilobytes(status, "VmHWM") - before) / 1024)


def _kilobytes(status: Path, name: str) -> float:
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return float(line.split()[1])
    return float("nan")


def print_row(row: Row) -> None:
    """One line of the table."""
    seconds, faster, memory = row["seconds"], row["faster_than"], row.get("memory_mb", {})
    assert isinstance(seconds, dict)
    assert isinstance(faster, dict)
    assert isinstance(memory, dict)
    skipped = row["skipped"]
    assert isinstance(skipped, dict)

    def cell(values: dict[str, float], name: str, form: str) -> str:
        return form.format(values[name]) if name in values else "-"

    notes = "; ".join(f"{name}: {why}" for name, why in skipped.items() if why != "one bandwidth only")
    mebibytes = " / ".join(cell(memory, name, "{:.0f}") for name in ("ours", "dense"))
    cells = (
        row["n"], row["d"], row["levels"], row["mode"], f"{seconds['ours']:.4g}",
        f"{row['ratio_to_floor']:.2f}",
        cell(faster, "dense", "{:.1f}x"), cell(faster, "geomloss", "{:.1f}x"),
        f"{mebibytes} / {row.get('input_mb', 0):.0f}", f"{row['peak_gflops']:.0f}",
        "; ".join(filter(None, (str(row["backend"]), notes))),
    )  # fmt: skip
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def fp64_mmd2(x: Tensor, y: Tensor, widths: list[float], *, unbiased: bool) -> tuple[float, Tensor]:
    """Independent reference: differences, one row at a time, float64; value and gradient by x."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    own = 1.0 / (n * (n - 1)) if unbiased else 1.0 / n**2
    other = 1.0 / (m * (m - 1)) if unbiased else 1.0 / m**2
    grad, total = torch.zeros_like(x), 0.0

    def kernel(a: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gap = a - rows
        q = (gap * gap).sum(1)
        values = torch.stack([torch.exp(-q / (2 * s * s)) for s in widths])
        return values.mean(0), (values * torch.tensor([[-0.5 / s**2] for s in widths]).double()).mean(0), gap

    for i in range(n):
        value, slope, gap = kernel(x[i], x)
        total += own * (value.sum().item() - (value[i].item() if unbiased else 0.0))
        grad[i] += 4.0 * own * (slope[:, None] * gap).sum(0)
        value, slope, gap = kernel(x[i], y)
        total -= 2.0 / (n * m) * value.sum().item()
        grad[i] -= 4.0 / (n * m) * (slope[:, None] * gap).sum(0)
    for j in range(m):
        value, _, _ = kernel(y[j], y)
        total += other * (value.sum().item() - (value[j].item() if unbiased else 0.0))
    return total, grad


def accuracy(*, device: str, n: int, m: int) -> list[Row]:
    """The cases of docs/mmd.md: ours and the dense code in single precision against float64."""
    width = 768
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator)
    y = torch.randn(m, width, generator=generator) + 0.05
    unit = torch.randn(width, generator=generator)
    unit /= unit.norm()
    shared = y.clone()
    shared[: m // 4] = x[: m // 4]
    plain, five = (2.0 * width) ** 0.5, list(FACTORS)
    middle = [plain * f for f in five]
    half = ((x + 300 * unit).bfloat16().float(), (y + 300 * unit).bfloat16().float())
    fine = [torch.nn.functional.normalize(z, dim=1) for z in (x, y)]
    cases: list[tuple[str, Tensor, Tensor, list[float], bool]] = [
        ("A ordinary", x, y, middle, False),
        ("A' unbiased", x, y, middle, True),
        ("C common offset 1e3", x + 1e3 * unit, y + 1e3 * unit, middle, False),
        ("C' common offset 3e4", x + 3e4 * unit, y + 3e4 * unit, middle, False),
        ("D clouds 1e3 apart", x, y + 1e3 * unit, [500.0 * f for f in five], False),
        ("F shared rows, sigma/8", x, shared, [s / 8 for s in middle], False),
        ("G CMMD", fine[0], fine[1], [10.0], False),
        ("G' CMMD unbiased", fine[0], fine[1], [10.0], True),
        ("H bf16 rows, offset 300", *half, middle, False),
    ]
    rows: list[Row] = []
    for name, a, b, widths, unbiased in cases:
        want, want_grad = fp64_mmd2(a, b, widths, unbiased=unbiased)
        record: Row = {"case": name, "mmd2": want}
        left, right = a.to(device).requires_grad_(), b.to(device)
        for method in ("ours", "dense"):
            if method == "dense" and unbiased:
                continue
            value = (
                mmd2(left, right, bandwidth=widths, estimator="unbiased" if unbiased else "biased")
                if method == "ours" else dense_mmd2(left, right, widths)
            )  # fmt: skip
            (grad,) = torch.autograd.grad(value, left)
            error = (grad.cpu().double() - want_grad).abs().max() / want_grad.abs().max()
            record[method] = {"value": abs(value.item() - want) / abs(want), "gradient": error.item()}
        rows.append(record)
        ours, dense = record["ours"], record.get("dense", {"value": float("nan"), "gradient": float("nan")})
        assert isinstance(ours, dict)
        assert isinstance(dense, dict)
        print(f"| {name} | {want:.3g} | {ours['value']:.1e} | {ours['gradient']:.1e} | {dense['value']:.1e} |"
              f" {dense['gradient']:.1e} |", flush=True)  # fmt: skip
    equal = abs(mmd2(x.to(device), x.clone().to(device), bandwidth=middle).item())
    print(f"| B equal sets (absolute) | 0 | {equal:.1e} | | | |")
    print(f"(cmmd of the same unit rows: {cmmd(x.to(device), y.to(device)).item():.4g})")
    return rows


def permutations(*, device: str, count: int, reps: int) -> Row:
    """Cost of 100 permutations over one statistic, interleaved."""
    x, y = make_rows(count, 768, device=device, mode="value")
    one, hundred = [], []
    for rep in range(reps + 1):
        first = timed(lambda: mmd_test(x, y, permutations=1, bandwidth=40.0), device=device)
        second = timed(lambda: mmd_test(x, y, permutations=100, bandwidth=40.0), device=device)
        if rep:
            one.append(first)
            hundred.append(second)
    ratio = median(hundred) / median(one)
    print(f"100 permutations at N=M={count}, D=768: {ratio:.2f}x one statistic ({median(hundred):.3g} s)")
    return {"n": count, "ratio": ratio, "seconds": median(hundred)}


def verdicts(rows: list[Row]) -> list[str]:
    """The promises of the issue, as measured."""
    lines = []
    for row in rows:
        ratio = row["ratio_to_floor"]
        assert isinstance(ratio, float)
        if (row["d"], row["levels"], row["mode"]) == (768, 5, "both") and row["n"] in (1024, 4096):
            lines.append(
                f"{'ok  ' if ratio <= 1.3 else 'MISS'} N={row['n']}: {ratio:.2f}x the floor (at most 1.30)"
            )
        faster, memory = row["faster_than"], row.get("memory_mb")
        assert isinstance(faster, dict)
        if "dense" in faster and faster["dense"] < 1.0:
            lines.append(
                f"MISS slower than dense: {row['n']} L={row['levels']} {row['mode']}, {faster['dense']:.2f}x"
            )
        if isinstance(memory, dict) and row["n"] == 16384 and row["mode"] == "both":
            limit = 2.2 * float(str(row["input_mb"])) + 32
            lines.append(f"{'ok  ' if memory['ours'] <= limit else 'MISS'} N=16384 L={row['levels']}: "
                         f"{memory['ours']:.0f} MiB (at most {limit:.0f})")  # fmt: skip
    if not any("slower than dense" in line for line in lines):
        lines.append("ok   never slower than dense autograd")
    return lines


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 runs")
    parser.add_argument("--sizes", nargs="*", metavar="NxD", help="only these, e.g. 1024x768 4096x1280")
    parser.add_argument("--reps", type=int, default=0, help="interleaved runs (7; 3 with --quick)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="skip the child processes")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    torch.set_num_threads(args.threads)
    reps = args.reps or (3 if args.quick else 7)
    sizes = QUICK if args.quick else SIZES
    if args.sizes:
        sizes = tuple((int(a), int(b)) for a, b in (size.split("x") for size in args.sizes))
    started = time.perf_counter()
    status = native_status()
    print("\n".join(describe_backend()))
    print(f"compiled epilogue: {status.reason}, {status.compile_seconds:.2f} s to be ready; "
          f"torch {torch.__version__}, {args.threads} thread(s), {reps} interleaved runs\n")  # fmt: skip
    print("| N=M | D | L | gradients | seconds | x floor | over dense | over geomloss | MiB ours/dense/inputs"
          " | sgemm GF/s | backend |\n|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    peak, rows = Peak(args.device), []
    for count, width in sizes:
        for levels in (1, 5):
            for mode in MODES:
                rows.append(bench_row(count, width, levels, mode, device=args.device, reps=reps, peak=peak,
                                      memory=not args.no_memory))  # fmt: skip
                print_row(rows[-1])
    print("\n| case | MMD^2 | value | gradient | dense value | dense gradient |\n|---|---|---|---|---|---|")
    n, m = (120, 100) if args.quick else (500, 400)
    precise = accuracy(device=args.device, n=n, m=m)
    print()
    tests = permutations(device=args.device, count=512 if args.quick else 2048, reps=reps)
    lines = verdicts(rows)
    print("\n" + "\n".join(lines) + f"\n{time.perf_counter() - started:.0f} s in all")
    if args.json:
        record = {"device": args.device, "threads": args.threads, "reps": reps, "torch": torch.__version__,
                  "backend": describe_backend(), "compile_seconds": status.compile_seconds, "rows": rows,
                  "accuracy": precise, "permutations": tests, "verdicts": lines}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
