"""``prefgen score``: a folder of pictures in the order in which one person would like them."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen.commands.options import add_artefact_options, add_image_options, open_pipeline
from prefgen.errors import ConfigError

if TYPE_CHECKING:
    from prefgen.ranking import Scores

_EPILOG = """\
examples:
  prefgen score --profile me.safetensors --images pictures/ --out scores.csv
  prefgen score --profile me.safetensors --images pictures/ --liked liked/ --disliked disliked/

The file alone gives an order: it holds means of image embeddings and no image to show the language model.
With the images of the history the language model is asked about each picture and gives a probability,
corrected where 'prefgen test --stage vqa' has left a calibration.json. The last line says what was done.
"""

_CHUNK = 256
"""Pictures held in memory at a time."""


def add_parser(subparsers: Any) -> None:
    """Add ``score``."""
    text = "rank pictures by how much one person would like them"
    parser = subparsers.add_parser("score", help=text, description=text.capitalize() + ".", epilog=_EPILOG)
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="the profile")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of pictures, or one picture"
    )
    add_image_options(parser, required=False)
    parser.add_argument("--out", type=Path, metavar="CSV", help="also write rank,image,score there")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    add_artefact_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score, print and write."""
    if args.disliked is not None and args.liked is None:
        raise ConfigError("--disliked needs the liked images too: --liked DIR --disliked DIR")
    if args.out is not None and args.out.exists() and not args.overwrite:
        raise ConfigError(f"--out {args.out} exists; pass another --out or --overwrite")
    from prefgen.ranking import MEANINGS
    from prefgen.taste import list_images

    files = list_images(args.images)
    scores = _scores(args, files=files)
    table = [(files[i].name, float(scores.values[i])) for i in scores.order()]
    if args.out is not None:
        _write(args.out, table=table)
    print("rank   score  image")
    for rank, (name, value) in enumerate(table, start=1):
        print(f"{rank:4} {value:7.4f}  {name}")
    if args.out is not None:
        print(f"scores: {args.out}")
    print(f"scored by {scores.scored_by}: {MEANINGS[scores.scored_by]}")
    return 0


def _scores(args: argparse.Namespace, *, files: list[Path]) -> Scores:
    import torch
    from tqdm import tqdm

    from prefgen.profile import UserProfile
    from prefgen.ranking import Scores
    from prefgen.taste import read_image, read_images

    profile = UserProfile.load(args.profile)
    pipeline = open_pipeline(args)
    liked = read_images(args.liked) if args.liked is not None else []
    disliked = read_images(args.disliked) if args.disliked is not None else []
    parts = []
    with tqdm(total=len(files), unit="image", desc="scoring") as bar:
        for start in range(0, len(files), _CHUNK):
            pictures = [read_image(file) for file in files[start : start + _CHUNK]]
            parts.append(
                pipeline.score(pictures, profile=profile, liked=liked, disliked=disliked, progress=bar.update)
            )
    return Scores(values=torch.cat([part.values for part in parts]), scored_by=parts[0].scored_by)


def _write(path: Path, *, table: list[tuple[str, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["rank", "image", "score"])
            writer.writerows(
                [rank, name, f"{value:.6f}"] for rank, (name, value) in enumerate(table, start=1)
            )
    except OSError as error:
        raise ConfigError(f"cannot write --out {path}: {error.strerror}") from None
