"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefgen.artefacts import Artefacts
from prefgen.config import resolve_path
from prefgen.errors import ConfigError

if TYPE_CHECKING:
    from prefgen.pipeline import PrefGenPipeline
    from prefgen.profile import UserProfile

_LARGEST_SEED = (1 << 62) - 1


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
    group.add_argument(
        "--adapter",
        metavar="FILE",
        help="adapter instead of the folder's: prefgen's, its export, or an IP-Adapter (.safetensors)",
    )
    group.add_argument(
        "--mllm",
        metavar="DIR",
        help="the multimodal LLM (default: mllm/ in the work folder if there is one, else asset:mini/mllm)",
    )
    group.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def artefacts_of(args: argparse.Namespace) -> Artefacts:
    """Where the options say that everything lies."""
    return Artefacts.find(
        None if args.artefacts is None else resolve_path(args.artefacts),
        pipeline=None if args.pipeline is None else resolve_path(args.pipeline),
        mllm=None if args.mllm is None else _model_name(args.mllm),
        adapter=None if args.adapter is None else resolve_path(args.adapter),
    )


def open_pipeline(args: argparse.Namespace) -> PrefGenPipeline:
    """The pipeline that the options name; nothing heavy is read yet."""
    import torch

    from prefgen.pipeline import PrefGenPipeline

    _check_device(args.device, num_gpus=torch.cuda.device_count())
    return PrefGenPipeline(artefacts_of(args), dtype=torch.float32, device=args.device)


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


def add_image_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Options that name a user's images."""
    parser.add_argument(
        "--liked", type=Path, required=required, metavar="DIR", help="folder of liked images, or one image"
    )
    parser.add_argument(
        "--disliked", type=Path, metavar="DIR", help="folder of disliked images, or one image"
    )


def finite_number(text: str) -> float:
    """A number from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def check_profile_out(path: Path, *, overwrite: bool) -> None:
    """Refuse a name that is no profile's, or that is taken.

    Raises:
        ConfigError: saying which.
    """
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; pass another --out FILE or --overwrite")
    if path.suffix != ".safetensors":
        raise ConfigError(f"--out {path}: a profile's name ends in .safetensors")


@contextlib.contextmanager
def profile_steps(count: int) -> Iterator[Callable[[str], object]]:
    """A bar over the steps of building a profile; what is given is called with the name of each."""
    from tqdm import tqdm

    with tqdm(total=count, unit="step", desc="profile") as bar:

        def tell(step: str) -> None:
            bar.set_description(step, refresh=True)
            bar.update(1)

        yield tell


def print_words(profile: UserProfile) -> None:
    """What the MLLM said."""
    print(f"likes:    {profile.likes or '(the MLLM names nothing)'}")
    print(f"dislikes: {profile.dislikes or '(the MLLM names nothing)'}")
