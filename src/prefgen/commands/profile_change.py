"""``prefgen profile update | combine``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from prefgen.commands.options import (
    add_artefact_options,
    add_image_options,
    check_profile_out,
    open_pipeline,
    print_words,
    profile_steps,
    seed_number,
)
from prefgen.errors import ConfigError


def add_update(actions: Any) -> None:
    """Add ``update``."""
    text = "add liked or disliked images to a profile, even one; the earlier images are not needed"
    parser = actions.add_parser(
        "update",
        help=text,
        description=text.capitalize()
        + ". The means of image embeddings come out as if built from all images. What the MLLM reads comes "
        "from the new images alone and is weighed against the stored mean by the number of images: near a "
        "build from all, not the same. Build again where the earlier images are still at hand.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the profile")
    add_image_options(parser, required=False)
    parser.add_argument(
        "--judged",
        type=Path,
        metavar="CSV",
        help="judge.csv of 'prefgen generate', with yes or no behind what you have looked at; feed it once",
    )
    parser.add_argument("--out", type=Path, metavar="NEW", help="where to write (default: FILE itself)")
    parser.add_argument(
        "--words", action="store_true", help="add what the MLLM says of the new images to the stored words"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the reference draws (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    add_artefact_options(parser)
    parser.set_defaults(run=run_update)


def add_combine(actions: Any) -> None:
    """Add ``combine``."""
    text = "several profiles as one: their weighted mean"
    parser = actions.add_parser(
        "combine",
        help=text,
        description=text.capitalize()
        + ". A negative weight takes that profile's negative twin at the weight's size: what it likes counts "
        "as disliked.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the profiles")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW", help="the profile to write")
    parser.add_argument(
        "--weights",
        type=_weights,
        metavar="W,W,..",
        help="one for each, such as 1,0.5,-0.3 (default: 1 each); with = if the first is negative",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    parser.set_defaults(run=run_combine)


def _weights(text: str) -> list[float]:
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(math.isfinite(weight) for weight in weights):
        raise argparse.ArgumentTypeError(f"expected numbers between commas, such as 1,0.5,-0.3, got {text!r}")
    return weights


def run_update(args: argparse.Namespace) -> int:
    """``prefgen profile update``."""
    if args.liked is None and args.disliked is None and args.judged is None:
        raise ConfigError(
            "profile update needs new images: --liked DIR, --disliked DIR or --judged judge.csv"
        )
    out = args.file if args.out is None else args.out
    check_profile_out(out, overwrite=args.overwrite or args.out is None)
    from prefgen.profile import UserProfile

    profile = UserProfile.load(args.file)
    liked, disliked = _new_images(args)
    taste = open_pipeline(args).taste
    with profile_steps(4 if args.words else 3) as tell:
        updated = taste.update_profile(
            profile, liked=liked, disliked=disliked, words=args.words, seed=args.seed, progress=tell
        )
    updated.save(out)
    if args.words:
        print_words(updated)
    elif profile.likes is not None or profile.dislikes is not None:
        print("words: dropped, they spoke of the earlier images alone; --words adds what the new ones say")
    counts = updated.counts
    print(
        f"profile: {out} ({out.stat().st_size:,} bytes; {len(liked)} liked, {len(disliked)} disliked images "
        f"added, now {counts.liked} and {counts.disliked}; update {counts.updates})"
    )
    return 0


def _new_images(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The liked and the disliked images that the options name."""
    from prefgen.judgements import read_judge_file
    from prefgen.taste import read_image, read_images

    liked = read_images(args.liked) if args.liked is not None else []
    disliked = read_images(args.disliked) if args.disliked is not None else []
    if args.judged is not None:
        judged = read_judge_file(args.judged)
        liked += [read_image(file) for file in judged.liked]
        disliked += [read_image(file) for file in judged.disliked]
    return liked, disliked


def run_combine(args: argparse.Namespace) -> int:
    """``prefgen profile combine``."""
    check_profile_out(args.out, overwrite=args.overwrite)
    from prefgen.profile import UserProfile
    from prefgen.profile_math import combined_profile

    profiles = [UserProfile.load(file) for file in args.files]
    weights = [1.0] * len(profiles) if args.weights is None else args.weights
    names = [str(file) for file in args.files]
    combined = combined_profile(profiles, weights=weights, names=names)
    combined.save(args.out)
    if any(profile.likes is not None or profile.dislikes is not None for profile in profiles):
        print("words: dropped, they spoke of one profile each")
    total = sum(abs(weight) for weight in weights)
    for name, weight in zip(names, weights, strict=True):
        side = ", its negative twin" if weight < 0 else ""
        print(f"  {abs(weight) / total:6.1%} {name}{side}")
    counts = combined.counts
    size = f"{args.out.stat().st_size:,} bytes; {counts.liked} liked, {counts.disliked} disliked images"
    print(f"profile: {args.out} ({size})")
    return 0
