"""``prefgen data encode``: latents and texts for stage inject, computed once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefgen.config import PRESETS, load_config, resolve_path

if TYPE_CHECKING:
    from prefgen.stages.inject.config import InjectConfig

_EPILOG = """\
example:
  prefgen data encode --preset sd15 --out work/sd15/encoded
  prefgen fit --stage inject --preset sd15 data.encoded=work/sd15/encoded

Settings are those of stage inject: pipeline, number formats, image size, shards. Called again it goes on
where it stopped.
"""


def add_encode(actions: Any) -> None:
    """Add ``encode`` to the actions of ``prefgen data``."""
    text = "compute latents and text embeddings of all liked images once, for stage inject"
    parser = actions.add_parser("encode", help=text, description=text.capitalize() + ".", epilog=_EPILOG)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the set (workdir/encoded)")
    parser.add_argument(
        "--preset", default="mini", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: mini)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file instead of a preset")
    parser.add_argument(
        "--store",
        choices=("float16", "float32"),
        default="float16",
        help="number format on disk; float16 moves the loss by about a thousandth (float16)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of stage inject")
    parser.set_defaults(run=run_encode, stage="inject")


def run_encode(args: argparse.Namespace) -> int:
    """``prefgen data encode``."""
    found = load_config("inject", preset=args.preset, file=args.config, overrides=args.overrides)
    for required in found.required_inputs():
        if required.key in ("data.shards", "model.pipeline"):
            required.check()
    out = args.out if args.out is not None else resolve_path(found.workdir) / "encoded"
    import torch
    from tqdm import tqdm

    from prefgen.precision import settle_precision
    from prefgen.stages.inject.encode import encode_shards

    config = cast("InjectConfig", settle_precision(found))
    device = "cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    with tqdm(unit="shard", desc="encode", dynamic_ncols=True, delay=0.3) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index = encode_shards(config, out=out, stored_as=args.store, device=device, progress=show)
    for split in index.splits:
        counts = index.counts(split)
        print(f"{split}: {counts.users:,} users, {counts.liked:,} images, {counts.bytes / 1e6:,.1f} MB")
    print(f"encoded shards are in {out}; train with data.encoded={out}")
    return 0
