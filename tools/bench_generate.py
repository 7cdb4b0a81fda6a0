"""What a user costs when drawing: whole pipelines timed against each other, round by round.

    python tools/bench_generate.py --pipeline tiny --steps 3 --repeats 2     # seconds: does it run
    python tools/bench_generate.py --pipeline asset:mini/pipeline --json generate.json
    python tools/bench_generate.py --pipeline sd15 --size 128 --repeats 5    # random weights, 9 GB
    python tools/bench_generate.py --pipeline FOLDER --device cuda

Four ways to draw the same prompts: our loop without users, with users, the stock pipeline, and the stock
pipeline with its own IP-Adapter of as many tokens. Each round runs all four in a new order, so that what else
the machine does meets them alike; medians of whole calls, text encoding and decoding included.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from diffusers import DiffusionPipeline

from prefgen.config import resolve_path
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape, PartName
from prefgen.models.ip_adapter import export_ip_adapter
from prefgen.models.sampling import SampleUsers, sample
from prefgen.models.user_adapter import UserAdapter, save_user_adapter

LIMIT = 1.10
"""Most that a user may cost, as a factor on the same loop without one."""

WIDTHS = (64, 256, 64)
"""Of the parts: they touch one small product per image, so their size hardly matters."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is drawn."""

    steps: int
    guidance: float
    size: tuple[int, int]
    batch: int


def open_folder(name: str, *, scratch: Path) -> Path:
    """A pipeline folder: one that exists, or one of random weights."""
    if name == "tiny":
        from prefgen.testing.diffusion import save_tiny_pipeline

        return save_tiny_pipeline(scratch / "tiny")
    if name == "sd15":
        from prefgen.testing.published import save_random_sd15

        return save_random_sd15(scratch / "sd15", dtype=torch.float32)
    return resolve_path(name)


class Bench:
    """Two copies of one pipeline: one for our loop and stock calls, one that has loaded its IP-Adapter."""

    def __init__(self, folder: Path, *, scratch: Path, size: int | None, device: str) -> None:
        self.stock, self.with_adapter = (self._load(folder, device=device) for _ in range(2))
        self.bundle = DiffusionBundle.of(
            self.stock.components,
            zero_empty_text=bool(self.stock.config.get("force_zeros_for_empty_prompt", False)),
            size=None if size is None else (size, size),
        )
        shape = FusionShape(
            parts=("aligned", "core", "image"), widths=WIDTHS, cross_width=self.bundle.cross_width
        )
        torch.manual_seed(0)
        self.adapter = UserAdapter(self.bundle.unet, shape=shape).requires_grad_(False).to(device)
        save_user_adapter(self.adapter, path=scratch / "user_adapter.safetensors", lineage={})
        export_ip_adapter(
            scratch / "user_adapter.safetensors", path=scratch / "ip_adapter.safetensors", projector=None
        )
        self.with_adapter.load_ip_adapter(
            str(scratch), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
        )
        self.with_adapter.set_ip_adapter_scale(0.8)
        self.parts: dict[PartName, torch.Tensor] = {
            name: torch.randn(1, width) for name, width in zip(shape.parts, WIDTHS, strict=True)
        }

    def _load(self, folder: Path, *, device: str) -> Any:
        pipe = DiffusionPipeline.from_pretrained(folder).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def ways(self, setting: Setting) -> dict[str, Callable[[], object]]:
        """The four ways, by name."""
        prompts = ["a red fox"] * setting.batch
        how = {"num_steps": setting.steps, "guidance_scale": setting.guidance}
        fusion = self.adapter.fusion
        rows = fusion.rows(self.parts)
        embeds = torch.cat([torch.zeros_like(rows), rows]) if setting.guidance > 1 else rows
        stock_how = {
            "height": setting.size[0],
            "width": setting.size[1],
            "num_inference_steps": setting.steps,
            "guidance_scale": setting.guidance,
            "output_type": "pt",
        }

        def base() -> object:
            self.adapter.attention.remove()
            return sample(self.bundle, prompts, seeds=range(setting.batch), **how)

        def users() -> object:
            self.adapter.attention.install()
            many = {name: value.expand(setting.batch, -1) for name, value in self.parts.items()}
            drawn = SampleUsers.of(self.adapter, parts=many, scale=0.8)
            return sample(self.bundle, prompts, seeds=range(setting.batch), users=drawn, **how)

        def stock() -> object:
            self.adapter.attention.remove()
            return self.stock(prompts, **stock_how)

        return {
            "base": base,
            "users": users,
            "stock": stock,
            "stock IP-Adapter": lambda: self.with_adapter(
                prompts, ip_adapter_image_embeds=[embeds], **stock_how
            ),
        }


def time_ways(ways: dict[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call; the first round of each is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    shuffle = random.Random(0)
    for number in range(repeats + 1):
        shuffle.shuffle(order)
        for name in order:
            began = time.perf_counter()
            ways[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(seconds: dict[str, list[float]], *, batch: int) -> dict[str, Any]:
    """Print a row a way; return it all as json."""
    middle = {name: median(values) for name, values in seconds.items()}
    print(f"\nbatch {batch}")
    print(f"  {'':<18}{'median s':>10}{'quartiles':>20}{'x base':>9}{'x stock':>9}")
    for name, values in seconds.items():
        low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
        ratios = f"{middle[name] / middle['base']:>9.3f}{middle[name] / middle['stock']:>9.3f}"
        print(f"  {name:<18}{middle[name]:>10.4f}{f'{low:.4f} to {high:.4f}':>20}{ratios}")
    cost = middle["users"] / middle["base"]
    theirs = middle["stock IP-Adapter"] / middle["stock"]
    print(
        f"  a user costs {cost:.3f}x (at most {LIMIT:.2f}: {'holds' if cost <= LIMIT else 'FAILS'}), ", end=""
    )
    print(f"diffusers' own IP-Adapter {theirs:.3f}x ({'holds' if cost < theirs else 'FAILS'})")
    return {"batch": batch, "seconds": seconds, "user_cost": cost, "ip_adapter_cost": theirs}


def main() -> None:
    """Read the command line and run."""
    text = __doc__ or ""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="asset:mini/pipeline", help="folder, 'tiny' or 'sd15'")
    parser.add_argument("--size", type=int, help="pixels on a side (the pipeline's own)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write every time here")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        scratch = Path(place)
        folder = open_folder(args.pipeline, scratch=scratch)
        bench = Bench(folder, scratch=scratch, size=args.size, device=args.device)
        tokens = bench.adapter.fusion.shape.num_user_tokens
        size = bench.bundle.image_size
        print(
            f"{args.pipeline}, {size[0]} x {size[1]} pixels, {args.steps} steps, {tokens} user tokens, ",
            end="",
        )
        print(f"{torch.get_num_threads()} threads, {args.device}")
        rows = []
        for batch in args.batch:
            setting = Setting(steps=args.steps, guidance=args.guidance_scale, size=size, batch=batch)
            seconds = time_ways(bench.ways(setting), repeats=args.repeats, device=args.device)
            rows.append(report(seconds, batch=batch))
    if args.json is not None:
        args.json.write_text(json.dumps({"setting": vars(args), "rows": rows}, indent=2, default=str) + "\n")
        print(f"\nevery time is in {args.json}")


if __name__ == "__main__":
    main()
