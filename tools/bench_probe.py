"""The layer study in one pass over the data against probing each cell on its own: time and peak memory.

Three ways to the same pooled states of every (layer, pooling) cell, each in a process of its own: "grid"
pools while one forward pass runs; "kept" keeps the hidden states of all layers and pools afterwards; "cells"
runs the data once for every cell. And two ways to the same probes: one batched module, or one module a cell.

    python tools/bench_probe.py                        # the mini MLLM
    python tools/bench_probe.py --mllm FOLDER --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackedBatch, PackItem, pack_batch
from prefgen.models.pooling import POOLINGS, pool, pooled_states
from prefgen.models.probes import ProbeGrid
from prefgen.models.questions import history_pieces, like_question
from prefgen.stages.features import model_source

WAYS = ("grid", "kept", "cells")


def batches(mllm: MLLM, options: argparse.Namespace) -> Iterator[PackedBatch]:
    """Histories of eight and eight images with three targets each."""
    rows = torch.Generator().manual_seed(0)
    for _ in range(0, options.rows, options.rows_per_pass):
        items = []
        for _ in range(options.rows_per_pass):
            drawn = torch.randint(options.images, (19,), generator=rows).tolist()
            history = history_pieces(drawn[:8], disliked=drawn[8:16])
            items.append(PackItem(history=history, questions=[like_question(row) for row in drawn[16:]]))
        yield pack_batch(mllm.encoder, items=items).to(mllm.device)


@torch.no_grad()
def pooled(way: str, mllm: MLLM, *, features: Tensor, options: argparse.Namespace) -> Tensor:
    """(samples, layers, poolings, D) float16 on the CPU."""
    parts = []
    if way == "kept":
        kept: list[tuple[PackedBatch, dict[int, Tensor]]] = []
        for batch in batches(mllm, options):
            states: dict[int, Tensor] = {}
            every = range(1, mllm.num_layers + 1)
            mllm.hidden(batch, image_features=features, layers=every, on_layer=states.__setitem__)
            kept.append((batch, states))
        for batch, states in kept:
            rows = [pool(states[layer], batch=batch) for layer in sorted(states)]
            parts.append(torch.stack(rows, dim=1).half().cpu())
        return torch.cat(parts)
    if way == "grid":
        for batch in batches(mllm, options):
            parts.append(pooled_states(mllm, batch=batch, image_features=features).half().cpu())
        return torch.cat(parts)
    for layer in range(1, mllm.num_layers + 1):
        for pooling in POOLINGS:
            cell = [
                pooled_states(mllm, batch=b, image_features=features, layers=[layer], poolings=[pooling])
                for b in batches(mllm, options)
            ]
            parts.append(torch.cat(cell)[:, 0, 0].half().cpu())
    return torch.stack(parts, dim=1).unflatten(1, (mllm.num_layers, len(POOLINGS)))


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process (or of the GPU) in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_way(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    mllm = MLLM.load(
        model_source(options.mllm),
        dtype=getattr(torch, options.dtype),
        device=options.device,
        attention=options.attention,
    )
    shape = (options.images, mllm.encoder.format.tokens_per_image, mllm.feature_size)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(mllm.device)
    before, start = peak_mib(mllm.device), time.perf_counter()
    states = pooled(way, mllm, features=features, options=options)
    seconds = time.perf_counter() - start
    check = float(states.double().sum()), float(states.double().abs().sum())
    return {
        "seconds": seconds,
        "memory": peak_mib(mllm.device) - before,
        "shape": list(states.shape),
        "check": check,
    }


def train_probes(num_cells: int, *, samples: int, dim: int, steps: int) -> tuple[float, float, float]:
    """Seconds of one batched grid, seconds of one module a cell, and the largest difference of weights."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, num_cells, dim, generator=generator)
    labels = torch.randint(2, (samples,), generator=generator)

    def train(grids: list[tuple[ProbeGrid, slice]]) -> float:
        start = time.perf_counter()
        for grid, cells in grids:
            grid.set_statistics(features[:, cells])
            optimizer = torch.optim.AdamW(grid.parameters(), lr=3e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                grid.loss(features[:, cells], labels=labels).sum().backward()
                optimizer.step()
        return time.perf_counter() - start

    whole = ProbeGrid(num_cells=num_cells, dim=dim, num_classes=2, generator=generator)
    single = []
    for cell in range(num_cells):
        one = ProbeGrid(num_cells=1, dim=dim, num_classes=2, generator=generator)
        with torch.no_grad():
            one.weight.copy_(whole.weight[cell : cell + 1])
        single.append((one, slice(cell, cell + 1)))
    together, apart = train([(whole, slice(None))]), train(single)
    weights = torch.cat([one.weight.detach() for one, _ in single])
    return together, apart, float((weights - whole.weight.detach()).abs().max())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mllm", default="asset:mini/mllm", help="folder or hub id")
    parser.add_argument("--rows", type=int, default=128, help="packed rows")
    parser.add_argument("--rows-per-pass", type=int, default=16)
    parser.add_argument("--images", type=int, default=512, help="images whose features are drawn from")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of the probes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", default="eager", help="attention code of transformers")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run_way(options.way, options)))
        return
    print(f"{options.mllm}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print("| pooled states | seconds | peak memory above the model, MiB | sum, sum of sizes |")
    print("|---|---|---|---|")
    shape: list[int] = []
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        shape = found["shape"]
        sums = ", ".join(f"{value:.6g}" for value in found["check"])
        print(f"| {way} | {found['seconds']:.2f} | {found['memory']:.0f} | {sums} |", flush=True)
    samples, layers, poolings, dim = shape
    together, apart, difference = train_probes(
        layers * poolings, samples=samples, dim=dim, steps=options.steps
    )
    print(f"\n| probes of {layers} x {poolings} cells | seconds |\n|---|---|")
    print(f"| one batched module | {together:.2f} |\n| one module a cell | {apart:.2f} |")
    print(f"\nlargest difference of weights {difference:.1e}")


if __name__ == "__main__":
    main()
