"""``prefgen profile build``: one profile, one for each of several tastes, or one for each user of shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from prefgen.schema import SPLITS

if TYPE_CHECKING:
    from prefgen.profile import UserProfile

_TEXT = "build a profile from liked and disliked images; one liked image is enough"
_MORE = (
    " With --tastes the liked images are grouped by their image embeddings and each group gets a profile: "
    "--out me.safetensors then names me-1.safetensors (the largest), me-2.safetensors .. With --shards every "
    "user of a split gets one in the folder --out; a run that was broken off goes on where it stopped."
)


def add_build(actions: Any) -> None:
    """Add ``build``."""
    parser = actions.add_parser("build", help=_TEXT, description=_TEXT.capitalize() + "." + _MORE)
    add_image_options(parser, required=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile to write")
    parser.add_argument(
        "--words", action="store_true", help="ask the MLLM what this user likes and dislikes, and store it"
    )
    parser.add_argument(
        "--user-id",
        nargs="?",
        const=True,
        metavar="NAME",
        help="store a name in the file (default: none); with --shards the user_id, without a NAME",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the reference draws (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    parser.add_argument(
        "--tastes",
        type=_tastes,
        metavar="K|auto",
        help="a profile for each of K groups of liked images; auto finds from 1 to 4 of them",
    )
    group = parser.add_argument_group("many users")
    group.add_argument("--shards", type=Path, metavar="DIR", help="history shards, instead of --liked")
    group.add_argument("--split", choices=SPLITS, help="whose users")
    add_artefact_options(parser)
    parser.set_defaults(run=run_build)


def _tastes(text: str) -> int | str:
    if text == "auto" or (text.isascii() and text.isdigit() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, or auto, got {text!r}")


def run_build(args: argparse.Namespace) -> int:
    """``prefgen profile build``."""
    if args.shards is not None:
        return _run_shards(args)
    if args.liked is None:
        raise ConfigError("profile build needs --liked DIR, or --shards DIR --split S for many users")
    if args.split is not None:
        raise ConfigError("--split goes with --shards DIR; liked images have no split")
    if args.user_id is True:
        raise ConfigError("--user-id needs a NAME here; only with --shards the shards know it")
    if args.tastes is not None:
        return _run_tastes(args)
    check_profile_out(args.out, overwrite=args.overwrite)
    from prefgen.taste import read_images

    liked = read_images(args.liked)
    disliked = read_images(args.disliked) if args.disliked is not None else []
    profile = _build(args, liked=liked, disliked=disliked)
    _save(profile, path=args.out)
    return 0


def _build(args: argparse.Namespace, *, liked: list[Any], disliked: list[Any]) -> UserProfile:
    taste = open_pipeline(args).taste
    with profile_steps(4 if args.words else 3) as tell:
        return taste.build_profile(
            liked,
            disliked=disliked,
            user_id=args.user_id,
            words=args.words,
            seed=args.seed,
            progress=tell,
        )


def _save(profile: UserProfile, *, path: Path, names: str = "") -> None:
    profile.save(path)
    if profile.likes is not None:
        print_words(profile)
    size, counts = path.stat().st_size, profile.counts
    seen = f"{counts.liked} liked, {counts.disliked} disliked images"
    print(f"profile: {path} ({size:,} bytes; {seen}){names}")


def _run_tastes(args: argparse.Namespace) -> int:
    """A profile for each group of liked images; the disliked ones belong to all."""
    from prefgen.models.clusters import find_clusters
    from prefgen.taste import list_images, read_image, read_images

    if args.out.suffix != ".safetensors":
        raise ConfigError(f"--out {args.out}: a profile's name ends in .safetensors")
    files = list_images(args.liked)
    liked = [read_image(file) for file in files]
    disliked = read_images(args.disliked) if args.disliked is not None else []
    pipeline = open_pipeline(args)
    wanted = None if args.tastes == "auto" else args.tastes
    embeds = pipeline.image_encoder.embed(liked)
    found = find_clusters(embeds, num_clusters=wanted, seed=args.seed)
    paths = [args.out.with_stem(f"{args.out.stem}-{i + 1}") for i in range(found.count)]
    for path in paths:
        check_profile_out(path, overwrite=args.overwrite)
    further = args.out.with_stem(f"{args.out.stem}-{found.count + 1}")
    if further.exists():
        raise ConfigError(f"{further} is left of a build with more tastes; delete it or pass another --out")
    how = "" if found.silhouette is None else f" (mean silhouette {found.silhouette:.2f})"
    print(f"tastes: {found.count} among {len(liked)} liked images{how}")
    for cluster, path in enumerate(paths):
        rows = found.rows(cluster)
        profile = _build(args, liked=[liked[row] for row in rows], disliked=disliked)
        _save(profile, path=path, names=f": {', '.join(files[row].name for row in rows)}")
    return 0


def _run_shards(args: argparse.Namespace) -> int:
    """A profile for each user of a split."""
    for name in ("liked", "disliked", "tastes"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} and --shards exclude each other; shards hold the images")
    if args.split is None:
        raise ConfigError(f"--shards needs --split, one of {', '.join(SPLITS)}")
    if args.user_id not in (None, True):
        raise ConfigError("--user-id takes no NAME with --shards: each user's own is stored")
    if args.overwrite:
        raise ConfigError("--overwrite does not go with --shards: whole profiles are kept; name a new --out")
    if args.out.is_file():
        raise ConfigError(f"--out {args.out} is a file; with --shards it names a folder")
    from tqdm import tqdm

    from prefgen.data.reader import ShardReader
    from prefgen.profile_batch import build_profiles

    total = len(ShardReader(args.shards, split=args.split))
    taste = open_pipeline(args).taste
    with tqdm(total=total, unit="user", desc="profiles") as bar:
        result = build_profiles(
            taste,
            shards=args.shards,
            split=args.split,
            out=args.out,
            user_ids=args.user_id is True,
            words=args.words,
            seed=args.seed,
            progress=bar.update,
        )
    for entry in result.skipped[:10]:
        print(f"left out: {entry.key}: {entry.reason}")
    if len(result.skipped) > 10:
        print(f"left out: {len(result.skipped) - 10} more, with reasons in {result.index}")
    print(f"profiles: {args.out} ({result.built} built, {result.kept} kept, {len(result.skipped)} left out)")
    print(f"index:    {result.index}")
    return 0
