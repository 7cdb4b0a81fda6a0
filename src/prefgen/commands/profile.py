"""``prefgen profile build | update | combine | explain | show``: the last two, and where all are named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen.commands.options import add_artefact_options, add_image_options, open_pipeline, print_words
from prefgen.commands.profile_build import add_build
from prefgen.commands.profile_change import add_combine, add_update
from prefgen.errors import ConfigError

if TYPE_CHECKING:
    from prefgen.pipeline import PrefGenPipeline
    from prefgen.profile import UserProfile

_EPILOG = """\
examples:
  prefgen profile build --liked liked/ --disliked disliked/ --out me.safetensors
  prefgen profile build --liked one.png --words --out me.safetensors
  prefgen profile build --liked liked/ --tastes auto --out me.safetensors
  prefgen profile update me.safetensors --liked another.png
  prefgen profile update me.safetensors --judged fox/judge.csv
  prefgen profile combine me.safetensors you.safetensors --weights 1,-0.3 --out us.safetensors
  prefgen profile explain me.safetensors
  prefgen profile show me.safetensors
"""


def add_parser(subparsers: Any) -> None:
    """Add ``profile`` and its actions."""
    text = "a person's taste as one small file: build it, bring it up to date, put it into words"
    parser = subparsers.add_parser("profile", help=text, description=text.capitalize() + ".", epilog=_EPILOG)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_build(actions)
    add_update(actions)
    add_combine(actions)
    _add_explain(actions)
    _add_show(actions)


def _add_explain(actions: Any) -> None:
    text = "say in words what this user likes and dislikes"
    parser = actions.add_parser(
        "explain",
        help=text,
        description=text.capitalize()
        + ": the words stored by 'build --words'; with the images at hand, what "
        "the MLLM says of them now; else attributes read linearly from the embedding in the file, with a "
        "probability each.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the profile")
    add_image_options(parser, required=False)
    add_artefact_options(parser)
    parser.set_defaults(run=run_explain)


def _add_show(actions: Any) -> None:
    text = "say what a profile holds and which models made it"
    parser = actions.add_parser("show", help=text, description=text.capitalize() + ".")
    parser.add_argument("file", type=Path, metavar="FILE", help="the profile")
    parser.set_defaults(run=run_show)


def run_explain(args: argparse.Namespace) -> int:
    """``prefgen profile explain``."""
    from prefgen.profile import UserProfile

    if args.disliked is not None and args.liked is None:
        raise ConfigError("--disliked needs the liked images too: --liked DIR --disliked DIR")
    profile = UserProfile.load(args.file)
    if args.liked is not None:
        profile = _ask_again(args, profile=profile)
    if profile.likes is not None or profile.dislikes is not None:
        print_words(profile)
        return 0
    pipeline = _readable(args)
    if pipeline is None:
        raise ConfigError(
            f"{args.file} holds no words; build it with 'prefgen profile build --words', "
            "or pass its images: --liked DIR --disliked DIR"
        )
    found = pipeline.explain(profile)
    print(f"likes:    {found.likes}")
    print(f"dislikes: {found.dislikes or '(no disliked image was seen)'}")
    print(
        "(a linear reading of the embedding, with probabilities; for the MLLM's own words pass the images, "
        "--liked DIR --disliked DIR, or build with 'prefgen profile build --words')"
    )
    return 0


def _ask_again(args: argparse.Namespace, *, profile: UserProfile) -> UserProfile:
    """The profile with what the MLLM says of the images now."""
    from dataclasses import replace

    from prefgen.taste import read_images

    taste = open_pipeline(args).taste
    profile.require_lineage(taste.lineage, what="the models at hand")
    disliked = read_images(args.disliked) if args.disliked is not None else []
    likes, dislikes = taste.words(read_images(args.liked), disliked=disliked)
    return replace(profile, likes=likes, dislikes=dislikes)


def _readable(args: argparse.Namespace) -> PrefGenPipeline | None:
    """The pipeline, if its artefacts hold a readout; those of an older fit do not."""
    from prefgen.artefacts import MINI_ASSETS

    if args.artefacts is None and not MINI_ASSETS.is_dir():
        return None
    pipeline = open_pipeline(args)
    return pipeline if pipeline.artefacts.attribute_readout.is_file() else None


def run_show(args: argparse.Namespace) -> int:
    """``prefgen profile show``."""
    from prefgen.profile import UserProfile

    profile = UserProfile.load(args.file)
    counts = profile.counts
    print(f"{args.file}: {args.file.stat().st_size:,} bytes")
    print(f"made from: {counts.liked} liked, {counts.disliked} disliked images, mean of {counts.draws} draws")
    if counts.combined:
        print(f"combined: from {counts.combined} profiles")
    if counts.updates:
        print(f"updates: {counts.updates} since it was built; core and sem are near a build from all images")
    for name, tensor in profile.tensors().items():
        print(f"  {name:20} {len(tensor):6} numbers, norm {float(tensor.norm()):.4g}")
    for part, value in sorted(profile.lineage.items()):
        print(f"  {part:20} {value[:12] if len(value) == 64 else value}")
    print(f"user_id: {profile.user_id or 'not stored'}")
    if profile.likes is None and profile.dislikes is None:
        print("words: not stored")
    else:
        print_words(profile)
    return 0
