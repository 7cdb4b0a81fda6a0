"""The judge's own training: on drawings no other model sees, clean and as the VAE restores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from prefgen.evaluate.judges import Judge
from prefgen.foundation.captioned import CaptionedImages
from prefgen.foundation.loop import Loop, LoopPlan, quick
from prefgen.foundation.vae import pixels, reconstruct
from prefgen.whole_file import whole_file

PLAN = LoopPlan(batch_size=96, steps=2_500, learning_rate=2e-3, warmup=100, weight_decay=0.05, every=250)

RESTORED = 20_000
"""Drawings of which the judge also sees the VAE's restoration: 64 of them take a second on two cores."""


def train_judge(
    data: CaptionedImages,
    heldout: CaptionedImages,
    *,
    vae: Path,
    work: Path,
    out: Path,
    plan: LoopPlan = PLAN,
) -> dict[str, object]:
    """Train and save to ``out``; half of every batch is the VAE's restoration of the drawing.

    Args:
        data: the judge's own drawings, in no order; no other model may have seen them.
        heldout: unseen drawings for its accuracy.
        vae: folder of the autoencoder.
        work: checkpoints and the cache of restored drawings.
        out: the file to write.
        plan: length and rate.

    Returns:
        Figures for the card: accuracy by group and for the subject, clean and restored.
    """
    torch.manual_seed(plan.seed)
    autoencoder = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).eval()
    subjects = tuple(sorted(set(data.prompts)))
    judge = Judge(groups=data.groups, subjects=subjects)
    targets = data.phrases().targets
    restored = _restored(
        autoencoder, data.images[:RESTORED], cache=work / f"restored-{data.fingerprint}-{RESTORED}.npy"
    )
    inner = [p for name, p in judge.named_parameters() if p.ndim >= 2 and name.startswith(("trunk.", "mix."))]
    loop = Loop(judge, plan=plan, folder=work, matrices=inner)

    def loss(_: int, rng: np.random.Generator, __: torch.Generator) -> dict[str, Tensor]:
        half = plan.batch_size // 2
        clean = np.sort(rng.integers(len(data), size=half))
        again = np.sort(rng.integers(len(restored), size=plan.batch_size - half))
        images = np.concatenate([data.images[clean], restored[again]])
        rows = np.concatenate([clean, again])
        with quick():
            heads, named = judge(_roughened(pixels(images), rng))
        parts = [
            nn.functional.cross_entropy(heads[name].float(), torch.from_numpy(targets[rows, g]))
            for g, name in enumerate(data.groups)
        ]
        naming = nn.functional.cross_entropy(named.float(), torch.from_numpy(targets[rows, -1]))
        return {"loss": torch.stack(parts).sum() + naming, "naming": naming}

    unseen = heldout.images[:2000]
    unseen_again = reconstruct(autoencoder, unseen)

    def report() -> dict[str, float]:
        figures = accuracy(judge, pixels(unseen), heldout)
        return figures | {f"{k}_restored": v for k, v in accuracy(judge, unseen_again, heldout).items()}

    loop.run(loss, report=report, title="judge")
    judge.eval()
    judge.save(out)
    return {
        "restored": len(restored),
        "gate": "none; attributes read below .80 on the VAE round trip leave the judged set, by name",
        **report(),
        "parameters": sum(p.numel() for p in judge.parameters()),
        "history": loop.history,
    }


def accuracy(judge: Judge, images: Tensor, data: CaptionedImages) -> dict[str, float]:
    """Share read right, per group and for the subject, over the first pictures of ``data``."""
    judgement = judge.judge(images)
    labels, names = data.labels()
    figures = {
        name: float((judgement.groups[name].argmax(1).numpy() == labels[: len(images), g]).mean())
        for g, name in enumerate(names)
    }
    named = [judge.subjects[int(i)] for i in judgement.subjects.argmax(1)]
    hits = [a == b for a, b in zip(named, data.prompts, strict=False)]
    return figures | {"subject": float(np.mean(hits))}


def _restored(vae: AutoencoderKL, images: npt.NDArray[np.uint8], *, cache: Path) -> npt.NDArray[np.uint8]:
    if not cache.exists():
        back = ((reconstruct(vae, images) + 1) * 127.5).round().to(torch.uint8)
        with whole_file(cache) as part, part.open("wb") as file:
            np.save(file, back.permute(0, 2, 3, 1).numpy())
    restored: npt.NDArray[np.uint8] = np.load(cache, mmap_mode="r", allow_pickle=False)
    return restored


def _roughened(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Small shifts of place, light and sharpness, as between a drawing and a generated picture."""
    shift = rng.integers(-2, 3, size=2).tolist()
    moved = torch.roll(images, shift, dims=(2, 3)) * float(rng.uniform(0.9, 1.1))
    if rng.random() < 0.3:
        moved = nn.functional.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    noise = torch.from_numpy(rng.standard_normal(moved.shape, dtype=np.float32))
    return (moved + float(rng.uniform(-0.1, 0.1)) + 0.05 * noise).clamp(-1, 1)
