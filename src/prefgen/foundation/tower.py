"""A vision tower learns to see before it learns to speak: the phrases of captions as classes.

Both towers of the foundation start so. From captions alone the MLLM's tower read the rendering of a drawing
in 24 % of cases after 1,250 steps, and a contrastive loss alone never taught a tower to tell subjects apart:
five attributes tell any two pictures of a batch apart already (2,400 steps, subjects named in 8 % of cases).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from prefgen.foundation.captioned import CaptionedImages
from prefgen.foundation.loop import Loop, LoopPlan, quick, quick_dtype

Encode = Callable[[npt.NDArray[np.uint8]], Tensor]
"""uint8 pictures (B, H, W, 3) -> features (B, D)."""
REPORTED = 512


def train_tower(
    parts: nn.Module,
    data: CaptionedImages,
    heldout: CaptionedImages,
    *,
    encode: Encode,
    width: int,
    work: Path,
    plan: LoopPlan,
    title: str,
) -> list[dict[str, float]]:
    """Train ``parts`` until subject and attributes can be read linearly from the features of a picture.

    Args:
        parts: what trains, beside a linear reader that is thrown away.
        data: pictures to learn from.
        heldout: unseen pictures for the report; of other subjects, their attributes alone are reported.
        encode: runs ``parts``.
        width: D of its features.
        work: checkpoints.
        plan: length and rate.
        title: name on the progress bar.

    Returns:
        The loop's history: share read right of each group, and of the subject.
    """
    phrases = data.phrases()
    reader = nn.Linear(width, sum(phrases.sizes))
    loop = Loop(nn.ModuleList([parts, reader]), plan=plan, folder=work)

    def read(images: npt.NDArray[np.uint8]) -> Tensor:
        # math attention: on a CPU the fused kernel's backward takes several times as long at these sizes
        with quick(), sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = reader(encode(images))
        return logits

    def loss(_: int, rng: np.random.Generator, __: torch.Generator) -> dict[str, Tensor]:
        rows = np.sort(rng.integers(len(data), size=plan.batch_size))
        return {"loss": phrases.loss(read(data.images[rows]), rows=rows)}

    unseen, names = heldout.phrases(), [*data.groups, "subject"]
    if set(heldout.prompts) != set(data.prompts):
        names = names[:-1]
        unseen = replace(unseen, targets=unseen.targets[:, :-1], sizes=phrases.sizes[:-1])

    def report() -> dict[str, float]:
        rows = np.arange(min(REPORTED, len(heldout)))
        logits = read(np.array(heldout.images[rows]))[:, : sum(unseen.sizes)]
        return dict(zip(names, unseen.accuracy(logits, rows=rows), strict=True))

    return loop.run(loss, report=report, title=title)


def encode_all(images: npt.NDArray[np.uint8], *, encode: Encode, title: str) -> Tensor:
    """Features of all pictures by a frozen tower: bfloat16 where products are, else float32."""
    chunks = []
    for start in tqdm(range(0, len(images), 512), unit="batch", desc=f"encoding {title}"):
        with torch.no_grad(), quick():
            chunks.append(encode(np.array(images[start : start + 512])).to(quick_dtype()))
    return torch.cat(chunks)
