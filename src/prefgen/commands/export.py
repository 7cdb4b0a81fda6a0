"""``prefgen export``: a trained adapter as files that nobody needs prefgen for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prefgen.commands.options import add_artefact_options, artefacts_of

_EPILOG = """\
example:
  prefgen export --format ip-adapter --artefacts work/x --profile me.safetensors --out adapter

Writes ip_adapter.safetensors, which stock diffusers loads with pipe.load_ip_adapter; draw.py, which draws for
a profile with diffusers alone; README.md, the model card; and for every --profile a file with what
pipe(ip_adapter_image_embeds=[..]) takes. The way back: 'prefgen generate --adapter FILE', or
'prefgen fit --stage inject model.init_adapter=FILE', which also take an IP-Adapter that others trained.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``export``."""
    text = "write the trained adapter for stock diffusers"
    parser = subparsers.add_parser("export", help=text, description=text.capitalize() + ".", epilog=_EPILOG)
    parser.add_argument("--format", required=True, choices=("ip-adapter",), help="of the adapter's file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--profile",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a profile to write as ready embeds; may be given several times",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights; below float32 images are near ours, not equal (float32)",
    )
    add_artefact_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    import torch

    from prefgen.exporting import export_for_diffusers

    done = export_for_diffusers(
        artefacts_of(args), out=args.out, profiles=args.profile, dtype=getattr(torch, args.dtype)
    )
    size = done.adapter.stat().st_size
    print(f"adapter: {done.adapter} ({done.num_parameters:,} parameters, {size / 1e6:,.1f} MB)")
    for path in done.embeds:
        print(f"embeds:  {path}")
    print(f"script:  {done.script}")
    print(f"card:    {done.card}")
    return 0
