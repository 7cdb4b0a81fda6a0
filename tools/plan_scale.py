"""A plan on paper from measured constants: disk, network, build time, epoch time, and what breaks first.

    python tools/plan_scale.py --bench work/bench_shards.json --step vqa=3.1 --step align=40

Takes the rates and the memory that tools/bench_shards.py measured and the steps a second of one device that
a run of yours has printed (``--step STAGE=RATE``, with the preset's batch size), and multiplies. Nothing it
prints is a measurement of the large case.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefgen.config import load_config
from prefgen.stages import STAGES


@dataclass(frozen=True, kw_only=True)
class Size:
    """A data set."""

    name: str
    users: int
    images: int


SIZES = (
    Size(name="PrefBench", users=50_153, images=990_998),
    Size(name="100 million images", users=5_000_000, images=100_000_000),
)
GPUS = (1, 8, 64)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bench", type=Path, required=True, help="figures of tools/bench_shards.py")
    parser.add_argument("--step", action="append", default=[], metavar="STAGE=RATE", help="of one device")
    parser.add_argument("--preset", default="mini", help="whose batch sizes the rates belong to (mini)")
    parser.add_argument("--image-kb", type=float, default=100.0, help="size of an encoded image (100)")
    parser.add_argument(
        "--feature-bytes", type=int, default=1152, help="of one image: tokens x width x 2 (1152)"
    )
    parser.add_argument("--network-gbit", type=float, default=10.0, help="of one node (10)")
    args = parser.parse_args()
    bench = json.loads(args.bench.read_text(encoding="utf-8"))
    read = max(row["mb_per_second"] for row in bench["reading"] if row["reader"] == "prefgen")
    build = max(row["mb_per_second"] for row in bench["building"]) / bench["cores"]
    index = bench["memory"][0]["index_mb"] / bench["memory"][-1]["samples"]
    print(
        f"measured ({args.bench}): reading {read:.0f} MB/s a process, building {build:.1f} MB/s a core, "
        f"index {index * 1e6:.0f} MB a million users"
    )
    print(
        f"given: {args.image_kb:.0f} KB and {args.feature_bytes} bytes of features an image, "
        f"{args.network_gbit:.0f} Gbit/s a node"
    )
    print("\n| data | shards on disk | build, 16 cores | build, 16 x 16 cores | to one node by network |")
    print("|---|---|---|---|---|")
    for size in SIZES:
        total = size.images * args.image_kb / 1e3
        print(
            f"| {size.name} | {total / 1e6:.2f} TB | {_time(total / build / 16)} | "
            f"{_time(total / build / 256)} | {_time(total / (args.network_gbit * 125))} |"
        )
    epochs({name: float(rate) for name, rate in (word.split("=") for word in args.step)}, args=args)
    print("\nwhat grows:")
    for size in SIZES:
        print(
            f"- {size.name}: the index takes {size.users * index / 1e3:.1f} GB in every process that reads; "
            f"features of vqa and probe take {size.images * args.feature_bytes / 1e9:.0f} GB of memory "
            "(data.cache_features=none encodes instead)"
        )


def epochs(rates: dict[str, float], *, args: Any) -> None:
    """The table of stages."""
    heads = " | ".join(f"epoch, {n} GPU" for n in GPUS)
    print(f"\n| stage | data | batch | steps/s | {heads} | reading needed at {GPUS[-1]} |")
    print("|---|---|---|---|" + "---|" * (len(GPUS) + 1))
    for stage in (name for name in STAGES if name in rates):
        batch = load_config(stage, preset=args.preset).data.batch_size  # type: ignore[attr-defined]
        for size in SIZES:
            seconds = size.users / (batch * rates[stage])
            # A sample of vqa brings all images of its user, one of inject the picture to be drawn.
            images = {"vqa": size.images / size.users, "inject": 1.0}.get(stage, 0.0)
            need = GPUS[-1] * batch * rates[stage] * images * args.image_kb / 1e3
            cells = " | ".join(_time(seconds / n) for n in GPUS)
            print(f"| {stage} | {size.name} | {batch} | {rates[stage]:g} | {cells} | {need:,.0f} MB/s |")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
