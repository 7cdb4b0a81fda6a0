"""How often a judge names the subject of what the base model draws, beside drawings that truly show it.

    python tools/name_base.py --pipeline src/prefgen/assets/mini/pipeline

Held-out drawings of the subjects no multimodal LLM has seen give the captions: the subject alone, or with
some of its attributes, or all. The base draws each caption, and the judge names the subject among all it
knows. Beside it stands what the judge names of the drawings themselves after the VAE's round trip: what a
base could reach that draws all attributes as they do. Intervals are over subjects (bootstrap, 95 %).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from prefgen.errors import PrefgenError
from prefgen.evaluate.judges import Judge
from prefgen.evaluate.preference import PromptFidelity
from prefgen.foundation.captioned import CaptionedImages, load_captioned
from prefgen.foundation.vae import reconstruct
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.pixels import to_uint8
from prefgen.models.sampling import sample
from prefgen.whole_file import write_json


def choose(data: CaptionedImages, *, each: int, limit: int) -> list[int]:
    """Rows of the first ``each`` drawings of each of the first ``limit`` unseen subjects."""
    rows: list[int] = []
    for prompt in sorted(data.unseen)[:limit]:
        rows += [i for i, shown in enumerate(data.prompts) if shown == prompt][:each]
    return rows


def named(judge: Judge, images: Tensor, *, prompts: list[str]) -> dict[str, float]:
    """Share named right, with its interval over subjects."""
    score = PromptFidelity(subjects=judge.subjects, among=judge.subjects)
    # A subject's pictures resemble each other, as a user's do.
    places = torch.tensor([judge.subjects.index(prompt) for prompt in prompts])
    score.update(judge.judge(images).subjects, prompts=prompts, users=places)
    return {name: round(float(value), 4) for name, value in score.compute().items()}


def draw(bundle: DiffusionBundle, captions: list[str], *, args: argparse.Namespace, title: str) -> Tensor:
    """(N,3,H,W) pictures in [-1,1], the noise of caption i from seed i."""
    parts = []
    for start in tqdm(range(0, len(captions), args.batch_size), unit="batch", desc=title):
        part = captions[start : start + args.batch_size]
        seeds = range(start, start + len(part))
        how = {"num_steps": args.num_steps, "guidance_scale": args.guidance_scale}
        parts.append(sample(bundle, part, seeds=list(seeds), **how).clamp(-1, 1))
    return torch.cat(parts)


def save_sheet(images: Tensor, *, path: Path, columns: int = 16) -> None:
    """The pictures in rows of ``columns``."""
    pictures = to_uint8(images)
    size = pictures[0].shape[0]
    sheet = Image.new("RGB", (columns * size, -(-len(pictures) // columns) * size), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(np.asarray(picture)), (i % columns * size, i // columns * size))
    sheet.save(path)


def main() -> int:
    """Draw, judge, print a row for every number of attributes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, default=Path("src/prefgen/assets/mini/pipeline"))
    parser.add_argument("--judge", type=Path, default=Path("src/prefgen/assets/mini/judge.safetensors"))
    parser.add_argument("--shards", type=Path, default=Path("work/foundation/drawings"))
    parser.add_argument("--cache", type=Path, default=Path("work/foundation/cache"))
    parser.add_argument("--subjects", type=int, default=32, help="unseen subjects")
    parser.add_argument("--each", type=int, default=3, help="pictures a subject")
    parser.add_argument("--attributes", type=int, nargs="+", default=[0, 1, 3, 5], help="in a caption")
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sheets", type=Path, metavar="DIR", help="write the pictures there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    try:
        data = load_captioned(args.shards, split="heldout", cache=args.cache)
        bundle, judge = DiffusionBundle.load(str(args.pipeline)), Judge.load(args.judge)
    except PrefgenError as error:
        print(f"name_base: error: {error}", file=sys.stderr)
        return 2
    rows = choose(data, each=args.each, limit=args.subjects)
    prompts = [data.prompts[i] for i in rows]
    figures = {"drawings": named(judge, reconstruct(bundle.vae, data.images[rows]), prompts=prompts)}
    for count in args.attributes:
        rng = np.random.default_rng(0)
        captions = []
        for i in rows:
            words = data.attributes[i]
            captions.append(", ".join([data.prompts[i], *rng.permutation(words).tolist()[:count]]))
        images = draw(bundle, captions, args=args, title=f"{count} attributes")
        figures[f"{count} attributes"] = named(judge, images, prompts=prompts)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            save_sheet(images, path=args.sheets / f"{count}.png")
    for name, found in figures.items():
        print(f"{name:14s} {found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
    if args.json:
        write_json(args.json, content=figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
