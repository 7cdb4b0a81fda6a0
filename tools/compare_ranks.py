"""2 and 4 gloo ranks against one process: losses and weights after 20 steps of each stage, as a table.

    python tools/compare_ranks.py --out work/ranks.json

Tiny models of the real classes, the same global batches on both sides, float32 on the CPU. Differences are
sums
in another order, which AdamW makes visible where a gradient is nearly 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from prefgen.stages import STAGES
from prefgen.testing.ranks import compare_ranks
from prefgen.testing.study import save_tiny_workdir


def main() -> None:
    """Print the table and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="json file for the figures")
    args = parser.parse_args()
    rows = []
    print(
        "| stage | strategy | ranks | steps | loss differs by | first loss | weights differ by | moved by |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="prefgen-ranks-") as folder:
        workdir = save_tiny_workdir(Path(folder) / "work", num_users=48)
        for stage in args.stages:
            for strategy in args.strategies:
                for ranks in args.ranks:
                    start = time.monotonic()
                    found = compare_ranks(
                        stage,
                        workdir=workdir,
                        folder=Path(folder) / f"{stage}-{strategy}-{ranks}",
                        world_size=ranks,
                        strategy=strategy,
                        steps=args.steps,
                    )
                    seconds = time.monotonic() - start
                    rows.append(
                        {
                            "stage": stage,
                            "strategy": strategy,
                            "ranks": ranks,
                            "seconds": seconds,
                            **asdict(found),
                        }
                    )
                    print(
                        f"| {stage} | {strategy} | {ranks} | {args.steps} | {found.loss_difference:.2e} | "
                        f"{found.losses[0]:.4g} | {found.weight_difference:.2e} | {found.weight_moved:.2e} |",
                        flush=True,
                    )
    worst = max(rows, key=lambda row: row["weight_difference"])
    print(
        f"\nlargest difference of a weight: {worst['weight_difference']:.2e} ({worst['stage']}, "
        f"{worst['strategy']}, {worst['ranks']} ranks); of a loss: "
        f"{max(row['loss_difference'] for row in rows):.2e}"
    )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        print(f"figures: {args.out}")


if __name__ == "__main__":
    main()
