"""What both examples share: which models, whose taste, and where the grid goes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from PIL.Image import Image

from prefgen.commands.generate import draw_grid
from prefgen.errors import ConfigError, PrefgenError
from prefgen.pipeline import PrefGenPipeline
from prefgen.profile import UserProfile
from prefgen.taste import read_images


def example_parser(description: str, *, prompt: str, out: str, user_scale: float) -> argparse.ArgumentParser:
    """The options of both examples, with the defaults of one."""
    parser = argparse.ArgumentParser(description=description)
    taste = parser.add_argument_group("taste")
    taste.add_argument("--profile", type=Path, action="append", default=[], metavar="FILE", help="a profile")
    taste.add_argument("--liked", type=Path, metavar="DIR", help="liked images, to build a profile from")
    taste.add_argument("--disliked", type=Path, metavar="DIR", help="disliked images, beside --liked")
    models = parser.add_argument_group("models (default: the mini ones shipped with prefgen)")
    models.add_argument("--artefacts", type=Path, metavar="DIR", help="work folder of the four stages")
    models.add_argument("--pipeline", type=Path, metavar="DIR", help="the diffusers pipeline")
    models.add_argument("--mllm", metavar="DIR", help="the multimodal LLM, for --liked")
    parser.add_argument("--prompt", default=prompt, help=f"what to draw ({prompt})")
    parser.add_argument("--user-scale", type=float, default=user_scale, help=f"strength ({user_scale:g})")
    parser.add_argument("--num-images", type=int, default=4, help="columns of the grid (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first column; the next has one more (0)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FILE", help=f"the grid ({out})")
    return parser


def open_pipeline(args: argparse.Namespace) -> PrefGenPipeline:
    """The models that the options name, once it is clear that the grid can be written.

    Raises:
        ConfigError: there is no such place for the grid.
        CheckpointError: no such artefacts.
    """
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write --out {args.out}: {error.strerror}") from None
    return PrefGenPipeline.load(args.artefacts, pipeline=args.pipeline, mllm=args.mllm)


def open_profiles(args: argparse.Namespace, *, pipeline: PrefGenPipeline) -> dict[str, UserProfile]:
    """Name -> profile, from files or from images.

    Raises:
        ConfigError: neither is given, or two of one name.
    """
    names = [path.stem for path in args.profile]
    names += [args.liked.name] if args.liked is not None else []
    if not names:
        raise ConfigError("whose taste? pass --profile FILE, or --liked DIR and --disliked DIR")
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two of {', '.join(names)} have one name, by which rows are told apart; rename one"
        )
    profiles = {path.stem: UserProfile.load(path) for path in args.profile}
    if args.liked is not None:
        disliked = read_images(args.disliked) if args.disliked is not None else []
        profiles[args.liked.name] = pipeline.build_profile(read_images(args.liked), disliked=disliked)
    return profiles


def save_grid(rows: dict[str, list[Image]], *, title: str, path: Path) -> None:
    """Write one row of images for each label, and say where.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        draw_grid(rows, title=title).save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"cannot write --out {path}: {error.strerror}") from None
    print(f"grid: {path}")


def run(main: Callable[[], None]) -> int:
    """The exit code; a mistake is answered in one line."""
    try:
        main()
    except PrefgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
