"""Draw for one profile with stock diffusers alone; ``prefgen export`` puts this file beside an adapter.

    python draw.py --pipeline FOLDER --profile me.safetensors --prompt "a red fox" --out fox.png

It needs torch, diffusers and safetensors, and nothing of prefgen: neither here nor anywhere in the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

PARTS = {"core": "core_embeds", "image": "image_embeds"}
LINEAGE = ("mllm", "lora", "probe", "image_encoder")


def read(path: Path, *, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header (json under ``key`` in the file's metadata) and tensors."""
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(key, "null"))
        if header is None:
            raise SystemExit(f"{path} is not what it should be: it has no {key} header")
        return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def image_embeds(adapter: Path, *, profile: Path) -> Tensor:
    """What ``pipe(ip_adapter_image_embeds=[..])`` takes for a profile.

    Args:
        adapter: the exported ``ip_adapter.safetensors``.
        profile: one user's profile.

    Returns:
        (2,P,D): the user of whom nothing is known, for the unconditional branch, then this one.
    """
    header, tensors = read(adapter, key="prefgen_ip_adapter")
    facts, taste = read(profile, key="profile")
    for part in LINEAGE:
        made_by, needed = facts["lineage"].get(part), header["lineage"].get(part)
        if None not in (made_by, needed) and made_by != needed:
            raise SystemExit(f"{profile} was made by another {part} than the adapter was trained with")
    shape = header["shape"]
    mean, scale = tensors["prefgen.fusion.mean"], tensors["prefgen.fusion.scale"]
    rows = torch.zeros(2, len(shape["parts"]), len(mean))
    start = 0
    for row, (part, width) in enumerate(zip(shape["parts"], shape["widths"], strict=True)):
        span = slice(start, start + width)
        start += width
        value = project(tensors, sem=taste["sem_embeds"]) if part == "aligned" else taste[PARTS[part]]
        if part != "image" or bool(value.any()):  # zeros: no such image is known
            rows[1, row, span] = (value - mean[span]) / scale[span]
    return rows


def project(tensors: dict[str, Tensor], *, sem: Tensor) -> Tensor:
    """The projector of stage align: (Dsem,) -> (Dtext,)."""
    own = {name.removeprefix("prefgen.projector."): value for name, value in tensors.items()}
    hidden = (sem[None] - own["sem_mean"]) / own["sem_scale"]
    hidden = F.layer_norm(hidden, hidden.shape[-1:], own["norm.weight"], own["norm.bias"])
    hidden = F.gelu(F.linear(hidden, own["up.weight"], own["up.bias"]))
    hidden = F.linear(hidden, own["down.weight"], own["down.bias"])
    return (own["text_mean"] + own["text_scale"] * hidden)[0]


def main() -> None:
    """Read the command line, draw, save."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description="Draw for one profile with stock diffusers.")
    parser.add_argument("--pipeline", required=True, help="the pipeline the adapter was trained for")
    parser.add_argument("--adapter", type=Path, default=Path(__file__).with_name("ip_adapter.safetensors"))
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    parser.add_argument("--user-scale", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(args.device)
    pipe.load_ip_adapter(
        str(args.adapter.resolve().parent),
        subfolder="",
        weight_name=args.adapter.name,
        image_encoder_folder=None,
    )
    pipe.set_ip_adapter_scale(args.user_scale)
    lora = args.adapter.with_name("text_lora.safetensors")
    if lora.is_file() and args.user_scale:  # trained along, in force where users are
        pipe.load_lora_weights(str(lora.resolve().parent), weight_name=lora.name)
    embeds = image_embeds(args.adapter, profile=args.profile).to(args.device, pipe.unet.dtype)
    image = pipe(
        args.prompt,
        ip_adapter_image_embeds=[embeds if args.guidance_scale > 1 else embeds[1:]],
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    image.save(args.out)


if __name__ == "__main__":
    main()
