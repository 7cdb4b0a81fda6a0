"""``prefgen generate``: images for one profile beside the base model's, and how to make them again."""

from __future__ import annotations

import argparse
import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen import __version__
from prefgen.commands.options import add_artefact_options, finite_number, open_pipeline, seed_number
from prefgen.errors import ConfigError
from prefgen.judgements import JUDGE_FILE, write_judge_file
from prefgen.lineage import hash_file
from prefgen.models.user_schedule import SCHEDULE_SHAPES, UserSchedule, check_negative_scale

if TYPE_CHECKING:
    from PIL.Image import Image

    from prefgen.pipeline import PrefGenPipeline

_EPILOG = """\
example:
  prefgen generate --profile me.safetensors --prompt "a red fox" --num-images 4 --seed 0 --out fox

Writes image-000.png .. and, unless --no-base, base-000.png .. (the same noise without the user), grid.png
with both, generation.json, which holds the command that makes the same images again, and judge.csv: write yes
or no behind the images you have looked at and feed it to 'prefgen profile update me.safetensors --judged'.
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
        "--user-scale",
        type=finite_number,
        default=0.8,
        help="strength of the user; 0 is the base model (0.8)",
    )
    parser.add_argument("--num-images", type=_count, default=4, help="how many images (4)")
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="of the first image; the next has one more (0)"
    )
    parser.add_argument("--steps", type=_count, default=25, help="denoising steps (25)")
    parser.add_argument(
        "--guidance-scale", type=finite_number, default=5.0, help="classifier-free guidance (5.0)"
    )
    parser.add_argument("--negative-prompt", default="", help="what not to draw, in words")
    parser.add_argument("--batch-size", type=_count, default=4, help="images drawn at a time (4)")
    parser.add_argument("--no-base", action="store_true", help="do not draw the base model's images beside")
    _add_steering(parser)
    add_artefact_options(parser)
    parser.set_defaults(run=run)


def _add_steering(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the user's taste works")
    group.add_argument(
        "--negative-user-scale",
        type=finite_number,
        default=0.0,
        help="strength of what the user dislikes in the unconditional branch, which guidance leaves (0)",
    )
    group.add_argument(
        "--user-scale-schedule",
        choices=SCHEDULE_SHAPES,
        default="constant",
        help="over the steps: linear rises from 0 to 1, early and late are halves of them (constant)",
    )
    group.add_argument(
        "--user-from",
        type=finite_number,
        default=0.0,
        metavar="F",
        help="fraction of the steps to begin at (0)",
    )
    group.add_argument(
        "--user-until",
        type=finite_number,
        default=1.0,
        metavar="F",
        help="fraction of the steps to end at (1)",
    )
    group.add_argument(
        "--user-scale-blocks",
        type=_blocks,
        default={},
        metavar="BLOCK=F,..",
        help="factor on the scales by block of the UNet, such as down=0.5,mid=1,up_blocks.1=0 (1 everywhere)",
    )


def _blocks(text: str) -> dict[str, float]:
    blocks: dict[str, float] = {}
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not name or not equals or name in blocks:
            raise argparse.ArgumentTypeError(
                f"expected blocks with a factor each, such as down=0.5,mid=1,up=1, got {text!r}"
            )
        blocks[name] = finite_number(value)
    return blocks


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
    schedule = UserSchedule(shape=args.user_scale_schedule, start=args.user_from, until=args.user_until)
    check_negative_scale(args.negative_user_scale, guidance_scale=args.guidance_scale)
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
                negative_user_scale=0.0 if name == "base" else args.negative_user_scale,
                schedule=schedule,
                block_scales=args.user_scale_blocks,
                batch_size=args.batch_size,
                progress=bar.update,
            )
    _write(args, rows=rows, pipeline=pipeline)
    print(f"images: {args.out} ({args.num_images} for {args.profile.name}, user_scale {args.user_scale:g})")
    print(f"grid:   {args.out / GRID}")
    print(f"record: {args.out / RECORD}")
    print(f"judge:  {args.out / JUDGE_FILE} (fill in yes or no, then 'prefgen profile update')")
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
        # The user's images first: those are what the user is asked about.
        names = [item["file"] for item in sorted(files, key=lambda item: not item["user"])]
        write_judge_file(args.out / JUDGE_FILE, images=names)
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
            "negative_user_scale": args.negative_user_scale,
            "user_scale_schedule": args.user_scale_schedule,
            "user_from": args.user_from,
            "user_until": args.user_until,
            "user_scale_blocks": args.user_scale_blocks,
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
    words += _steering_words(args)
    if args.negative_prompt:
        words += ["--negative-prompt", args.negative_prompt]
    if args.no_base:
        words.append("--no-base")
    for name in ("artefacts", "pipeline", "mllm", "adapter"):
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    return [*words, "--device", args.device, "--out", str(args.out)]


def _steering_words(args: argparse.Namespace) -> list[str]:
    """Options of the group that differ from what they are without being named."""
    words: list[str] = []
    for name, usual in (
        ("negative_user_scale", 0.0),
        ("user_scale_schedule", "constant"),
        ("user_from", 0.0),
        ("user_until", 1.0),
    ):
        if getattr(args, name) != usual:
            # With "=", as argparse would take a negative number in words of its own for an option.
            words.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    if args.user_scale_blocks:
        blocks = ",".join(f"{name}={factor}" for name, factor in args.user_scale_blocks.items())
        words.append(f"--user-scale-blocks={blocks}")
    return words


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
