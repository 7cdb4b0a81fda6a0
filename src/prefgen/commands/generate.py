"""``prefgen generate``: images for one profile beside the base model's, and how to make them again."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen import __version__
from prefgen.commands.profile import add_artefact_options, open_pipeline, seed_number
from prefgen.errors import ConfigError
from prefgen.lineage import hash_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from prefgen.pipeline import PrefGenPipeline

_EPILOG = """\
example:
  prefgen generate --profile me.safetensors --prompt "a red fox" --num-images 4 --seed 0 --out fox

Writes image-000.png .. and, unless --no-base, base-000.png .. (the same noise without the user), grid.png
with both, and generation.json, which holds the command that makes the same images again.
"""

RECORD = "generation.json"
GRID = "grid.png"


def add_parser(subparsers: Any) -> None:
    """Add ``generate``."""
    text = "draw images for one person's profile"
    parser = subparsers.add_parser("generate", help=text, description=text.capitalize() + ".", epilog=_EPILOG)
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="the profile")
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--user-scale", type=_number, default=0.8, help="strength of the user; 0 is the base model (0.8)"
    )
    parser.add_argument("--num-images", type=_count, default=4, help="how many images (4)")
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="of the first image; the next has one more (0)"
    )
    parser.add_argument("--steps", type=_count, default=25, help="denoising steps (25)")
    parser.add_argument("--guidance-scale", type=_number, default=5.0, help="classifier-free guidance (5.0)")
    parser.add_argument("--negative-prompt", default="", help="what not to draw, in words")
    parser.add_argument("--batch-size", type=_count, default=4, help="images drawn at a time (4)")
    parser.add_argument("--no-base", action="store_true", help="do not draw the base model's images beside")
    add_artefact_options(parser)
    parser.set_defaults(run=run)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Draw and write."""
    if args.out.is_file():
        raise ConfigError(f"--out {args.out} is a file; name a folder")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise ConfigError(f"--out {args.out} is not empty; name a new folder, nothing is ever overwritten")
    from prefgen.profile import UserProfile

    profile = UserProfile.load(args.profile)
    pipeline = open_pipeline(args)
    profile.require_lineage(pipeline.painter.lineage, what=f"the adapter {pipeline.artefacts.user_adapter}")
    from tqdm import tqdm

    scales = {"image": args.user_scale} if args.no_base else {"base": 0.0, "image": args.user_scale}
    rows: dict[str, list[Image]] = {}
    with tqdm(total=args.num_images * len(scales), unit="image", desc="drawing") as bar:
        for name, scale in scales.items():
            rows[name] = pipeline.generate(
                args.prompt,
                profile=profile,
                user_scale=scale,
                num_images=args.num_images,
                seed=args.seed,
                num_steps=args.steps,
                guidance_scale=args.guidance_scale,
                negative_prompt=args.negative_prompt,
                batch_size=args.batch_size,
                progress=bar.update,
            )
    _write(args, rows=rows, pipeline=pipeline)
    print(f"images: {args.out} ({args.num_images} for {args.profile.name}, user_scale {args.user_scale:g})")
    print(f"grid:   {args.out / GRID}")
    print(f"record: {args.out / RECORD}")
    return 0


def _write(args: argparse.Namespace, *, rows: dict[str, list[Image]], pipeline: PrefGenPipeline) -> None:
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        files = []
        for name, images in rows.items():
            for number, image in enumerate(images):
                path = args.out / f"{name}-{number:03d}.png"
                image.save(path)
                files.append(_image_record(path, kind=name, seed=args.seed + number))
        labels = {"base": "base model", "image": f"{args.profile.stem}, user_scale {args.user_scale:g}"}
        draw_grid({labels[name]: images for name, images in rows.items()}, title=args.prompt).save(
            args.out / GRID
        )
        record = _record(args, files=files, pipeline=pipeline)
        (args.out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to --out {args.out}: {error.strerror}") from None


def _image_record(path: Path, *, kind: str, seed: int) -> dict[str, Any]:
    return {"file": path.name, "user": kind == "image", "seed": seed, "sha256": hash_file(path)}


def _record(
    args: argparse.Namespace, *, files: list[dict[str, Any]], pipeline: PrefGenPipeline
) -> dict[str, Any]:
    """What makes the same images again: the command, the versions, and hashes of every input."""
    artefacts = pipeline.artefacts
    return {
        "command": shlex.join(_command(args)),
        "settings": {
            "prompt": args.prompt,
            "negative_prompt": args.negative_prompt,
            "user_scale": args.user_scale,
            "num_images": args.num_images,
            "seed": args.seed,
            "steps": args.steps,
            "guidance_scale": args.guidance_scale,
            "batch_size": args.batch_size,
            "device": args.device,
        },
        "versions": {
            "prefgen": __version__,
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "pillow")},
        },
        "inputs": {
            "profile": {"file": str(args.profile), "sha256": hash_file(args.profile)},
            "user_adapter": {
                "file": str(artefacts.user_adapter),
                "sha256": hash_file(artefacts.user_adapter),
            },
            "pipeline": str(artefacts.pipeline),
            "lineage": pipeline.painter.lineage,
        },
        "images": files,
    }


def _command(args: argparse.Namespace) -> list[str]:
    words = ["prefgen", "generate", "--profile", str(args.profile), "--prompt", args.prompt]
    words += ["--user-scale", str(args.user_scale), "--num-images", str(args.num_images)]
    words += ["--seed", str(args.seed), "--steps", str(args.steps)]
    words += ["--guidance-scale", str(args.guidance_scale), "--batch-size", str(args.batch_size)]
    if args.negative_prompt:
        words += ["--negative-prompt", args.negative_prompt]
    if args.no_base:
        words.append("--no-base")
    for name in ("artefacts", "pipeline", "mllm"):
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    return [*words, "--device", args.device, "--out", str(args.out)]


def draw_grid(rows: dict[str, list[Image]], *, title: str) -> Image:
    """One labelled row of images a key, under a title; small images are enlarged to be looked at."""
    from PIL import Image as Pictures
    from PIL import ImageDraw, ImageFont

    width, height = next(iter(rows.values()))[0].size
    factor = max(1, 192 // max(width, height))
    width, height, line, gap = width * factor, height * factor, 18, 4
    columns = max(len(images) for images in rows.values())
    sheet = Pictures.new(
        "RGB", (columns * (width + gap) + gap, line + len(rows) * (line + height + gap)), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    pen.text((gap, 2), title, fill="black", font=font)
    top = line
    for label, images in rows.items():
        pen.text((gap, top + 2), label, fill="black", font=font)
        for column, image in enumerate(images):
            enlarged = image.resize((width, height), Pictures.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + column * (width + gap), top + line))
        top += line + height + gap
    return sheet
