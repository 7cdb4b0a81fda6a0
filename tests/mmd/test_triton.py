"""The Triton kernels without a GPU: in the interpreter, and compiled ahead of time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="triton is not installed (pip install 'prefgen[triton]')")

# Value (absolute) and gradient (of its largest entry) by case of interpreted.py; tf32 and bf16 come last.
LIMITS = [(1e-7, 2e-6)] * 5 + [(3e-6, 6e-4), (3e-5, 6e-3)]


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "interpreted.py")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(LIMITS)))
def test_interpreter_equals_the_double_loop(interpreted, number):
    assert len(interpreted) == len(LIMITS)
    record, (value, gradient) = interpreted[number], LIMITS[number]
    assert record["value"] <= value
    assert record["gradient"] <= gradient
    assert record["repeatable"]


SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
EVERY_RUN = {(80, "tf32x3"), (90, "bf16"), (100, "tf32")}
"""Each architecture and each precision once; the other pairs are slow tests."""


def compile_pair(architecture, precision, *, slopes=True, chain=True):
    """The pair kernel for one target, with the launch shape that would be used there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    from prefgen.mmd.triton_kernels import pair_kernel
    from prefgen.mmd.triton_pass import launch_for

    launch = launch_for(capability=divmod(architecture, 10), precision=precision, width=768)
    half = precision == "bf16"
    constants = {
        "LEVELS": 5, "CHAIN": chain, "WEIGHTED": False, "HOLLOW": False, "SLOPES": slopes, "UPCAST": False,
        "PRECISION": "tf32" if half else precision, "BLOCK_I": launch.block_i, "BLOCK_J": launch.block_j,
        "BLOCK_D": launch.block_d,
    }  # fmt: skip
    types = dict.fromkeys(
        ("row", "column", "row_weight", "column_weight", "table", "factor", "totals"), "*fp32"
    )
    types |= dict.fromkeys(("a", "b", "panel"), "*bf16" if half else "*fp32")
    types |= dict.fromkeys(("rows", "columns", "width", "stride_a", "stride_b", "stride_panel"), "i32")
    names = pair_kernel.arg_names
    aligned = ("a", "b", "panel", "width", "stride_a", "stride_b", "stride_panel")
    source = ASTSource(
        fn=pair_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return build(source, target=GPUTarget("cuda", architecture, 32), options=options)


def stack_bytes(binary, folder):
    """Local memory of a thread: spills and nothing else, as the kernel has no arrays."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1]) + int(re.search(r"LOCAL:(\d+)", report)[1])


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        pytest.param(
            architecture, precision, marks=() if (architecture, precision) in EVERY_RUN else pytest.mark.slow
        )
        for architecture in SHARED
        for precision in ("tf32x3", "tf32", "bf16")
    ],
)
def test_compiles_ahead_of_time(architecture, precision, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compile_pair(architecture, precision)
    assembly = kernel.asm["ptx"]
    assert re.search(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", assembly)
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", assembly, flags=re.MULTILINE)
    assert kernel.metadata.shared <= SHARED[architecture]
    assert stack_bytes(kernel.asm["cubin"], tmp_path) <= 256


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("variant", [{"precision": "ieee"}, {"precision": "tf32", "slopes": False},
                                     {"precision": "tf32", "chain": False}])  # fmt: skip
def test_other_variants_compile(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compile_pair(90, **variant)
    assert kernel.metadata.shared <= SHARED[90]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16"])
def test_on_a_gpu(precision):
    import torch

    from prefgen.mmd import mmd2

    limits = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
    x = torch.randn(1500, 768, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    y = (torch.randn(1300, 768, generator=torch.Generator().manual_seed(1)) + 0.05).cuda()
    want = mmd2(x.double(), y.double(), bandwidth="mean")
    (want_grad,) = torch.autograd.grad(want, x)
    got = mmd2(x, y, bandwidth="mean", backend="triton", precision=precision)
    (grad,) = torch.autograd.grad(got, x)
    assert abs(got.item() - want.item()) <= limits[precision] * want.item()
    assert (grad - want_grad).abs().max() <= 10 * limits[precision] * want_grad.abs().max()
