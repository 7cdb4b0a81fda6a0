"""Train the mini foundation, part by part, from captioned shards.

    python tools/train_foundation.py --shards work/foundation/drawings --out src/prefgen/assets/mini

Parts run in the order vae, clip, unet, adapter, mllm, judge; ``--only`` picks some. A part that was stopped
goes on from its last checkpoint in ``--work``; a finished one trains no more until its checkpoints are
removed. Any shards of ``KEY.webp`` + ``KEY.json`` (prompt, attributes, family) beside an ``attributes.json``
will do.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from prefgen.errors import PrefgenError
from prefgen.foundation.build import PARTS, build_part


def main() -> int:
    """Parse, train, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, default=Path("work/foundation/drawings"))
    parser.add_argument("--work", type=Path, default=Path("work/foundation"), help="checkpoints and caches")
    parser.add_argument("--out", type=Path, default=Path("work/foundation/out"), help="the finished folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps of the part (default: the part's own plan)")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="trained UNet to begin with (with --only unet, empty --work)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.steps and len(args.only) != 1:
        parser.error("--steps belongs to one part: name it with --only")
    if args.start and args.only != ["unet"]:
        parser.error("--start belongs to the UNet: add --only unet")
    try:
        for part in args.only:
            build_part(
                part,
                shards=args.shards,
                work=args.work,
                out=args.out,
                seed=args.seed,
                steps=args.steps,
                start=args.start,
            )
    except PrefgenError as error:
        print(f"train_foundation: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
