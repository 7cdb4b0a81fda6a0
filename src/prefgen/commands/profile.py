"""``prefgen profile build | explain | show``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen.config import resolve_path
from prefgen.errors import ConfigError

if TYPE_CHECKING:
    from prefgen.pipeline import PrefGenPipeline
    from prefgen.profile import UserProfile

_EPILOG = """\
examples:
  prefgen profile build --liked liked/ --disliked disliked/ --out me.safetensors
  prefgen profile build --liked one.png --words --out me.safetensors
  prefgen profile explain me.safetensors
  prefgen profile show me.safetensors
"""


_LARGEST_SEED = (1 << 62) - 1


def add_parser(subparsers: Any) -> None:
    """Add ``profile`` and its actions."""
    text = "a person's taste as one small file: build it, put it into words, look at it"
    parser = subparsers.add_parser("profile", help=text, description=text.capitalize() + ".", epilog=_EPILOG)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_build(actions)
    _add_explain(actions)
    _add_show(actions)


def add_artefact_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which trained models to use."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--artefacts",
        metavar="DIR",
        help="work folder whose four stages were fitted (default: the mini artefacts shipped with prefgen)",
    )
    group.add_argument(
        "--pipeline", metavar="DIR", help="the diffusers pipeline (default: asset:mini/pipeline)"
    )
    group.add_argument("--mllm", metavar="DIR", help="the multimodal LLM (default: asset:mini/mllm)")
    group.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def open_pipeline(args: argparse.Namespace) -> PrefGenPipeline:
    """The pipeline that the options name; nothing heavy is read yet."""
    import torch

    from prefgen.pipeline import PrefGenPipeline

    _check_device(args.device, num_gpus=torch.cuda.device_count())
    return PrefGenPipeline.load(
        None if args.artefacts is None else resolve_path(args.artefacts),
        pipeline=None if args.pipeline is None else resolve_path(args.pipeline),
        mllm=None if args.mllm is None else _model_name(args.mllm),
        device=args.device,
    )


def _check_device(device: str, *, num_gpus: int) -> None:
    if (match := re.fullmatch(r"cpu|cuda(?::(\d+))?", device)) is None:
        raise ConfigError(f"--device: {device!r} is not one of cpu, cuda, cuda:N")
    if device != "cpu" and int(match[1] or 0) >= num_gpus:
        raise ConfigError(f"--device {device}: torch sees {num_gpus} GPUs here; use --device cpu")


def seed_number(text: str) -> int:
    """A seed from the command line: what numpy and torch both take, with room for one more an image."""
    if not text.isascii() or not text.isdigit() or int(text) > _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {_LARGEST_SEED}, got {text!r}")
    return int(text)


def _model_name(name: str) -> str:
    path = resolve_path(name)
    return str(path) if path.is_dir() else name


def _add_images(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--liked", type=Path, required=required, metavar="DIR", help="folder of liked images, or one image"
    )
    parser.add_argument(
        "--disliked", type=Path, metavar="DIR", help="folder of disliked images, or one image"
    )


def _add_build(actions: Any) -> None:
    text = "build a profile from liked and disliked images; one liked image is enough"
    parser = actions.add_parser("build", help=text, description=text.capitalize() + ".")
    _add_images(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile to write")
    parser.add_argument(
        "--words", action="store_true", help="ask the MLLM what this user likes and dislikes, and store it"
    )
    parser.add_argument("--user-id", metavar="NAME", help="store a name in the file (default: none)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the reference draws (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    add_artefact_options(parser)
    parser.set_defaults(run=run_build)


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
    _add_images(parser, required=False)
    add_artefact_options(parser)
    parser.set_defaults(run=run_explain)


def _add_show(actions: Any) -> None:
    text = "say what a profile holds and which models made it"
    parser = actions.add_parser("show", help=text, description=text.capitalize() + ".")
    parser.add_argument("file", type=Path, metavar="FILE", help="the profile")
    parser.set_defaults(run=run_show)


def run_build(args: argparse.Namespace) -> int:
    """``prefgen profile build``."""
    if args.out.exists() and not args.overwrite:
        raise ConfigError(f"{args.out} exists; pass another --out FILE or --overwrite")
    if args.out.suffix != ".safetensors":
        raise ConfigError(f"--out {args.out}: a profile's name ends in .safetensors")
    from tqdm import tqdm

    from prefgen.taste import read_images

    liked = read_images(args.liked)
    disliked = read_images(args.disliked) if args.disliked is not None else []
    taste = open_pipeline(args).taste
    with tqdm(total=4 if args.words else 3, unit="step", desc="profile") as bar:

        def tell(step: str) -> None:
            bar.set_description(step, refresh=True)
            bar.update(1)

        profile = taste.build_profile(
            liked,
            disliked=disliked,
            user_id=args.user_id,
            words=args.words,
            seed=args.seed,
            progress=tell,
        )
    profile.save(args.out)
    if args.words:
        _print_words(profile)
    size = args.out.stat().st_size
    print(f"profile: {args.out} ({size:,} bytes; {len(liked)} liked, {len(disliked)} disliked images)")
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """``prefgen profile explain``."""
    from prefgen.profile import UserProfile

    if args.disliked is not None and args.liked is None:
        raise ConfigError("--disliked needs the liked images too: --liked DIR --disliked DIR")
    profile = UserProfile.load(args.file)
    if args.liked is not None:
        profile = _ask_again(args, profile=profile)
    if profile.likes is not None or profile.dislikes is not None:
        _print_words(profile)
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


def _print_words(profile: UserProfile) -> None:
    print(f"likes:    {profile.likes or '(the MLLM names nothing)'}")
    print(f"dislikes: {profile.dislikes or '(the MLLM names nothing)'}")


def run_show(args: argparse.Namespace) -> int:
    """``prefgen profile show``."""
    from prefgen.profile import UserProfile

    profile = UserProfile.load(args.file)
    counts = profile.counts
    print(f"{args.file}: {args.file.stat().st_size:,} bytes")
    print(f"made from: {counts.liked} liked, {counts.disliked} disliked images, mean of {counts.draws} draws")
    for name, tensor in profile.tensors().items():
        print(f"  {name:20} {len(tensor):6} numbers, norm {float(tensor.norm()):.4g}")
    for part, value in sorted(profile.lineage.items()):
        print(f"  {part:20} {value[:12] if len(value) == 64 else value}")
    print(f"user_id: {profile.user_id or 'not stored'}")
    if profile.likes is None and profile.dislikes is None:
        print("words: not stored")
    else:
        _print_words(profile)
    return 0
