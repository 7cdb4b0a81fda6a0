"""A user adapter that reads tastes written in words, trained on captioned pictures before there are users.

To stage inject it is what a published IP-Adapter is to Stable Diffusion: cross-attention that can already
carry colours, backgrounds and frames into the frozen UNet, so that the few steps on users' pictures only have
to teach whose they are. Its input is what stage align aims at: the pooled text embedding of a list of
attributes. Not in the paper: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from prefgen.foundation.captioned import CaptionedImages
from prefgen.foundation.loop import Loop, LoopPlan
from prefgen.foundation.unet import denoising_loss, latents_of
from prefgen.lineage import hash_folder
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.text import TextSpace
from prefgen.models.user_adapter import UserAdapter, save_user_adapter

STAGED_RATE = 0.3
"""Share of drawings in the middle of a scene in a batch."""

SECOND_RATE = 0.6
"""How often a list names a second value of a group beside the picture's own: a user likes more than one, and
a picture shows one of them."""

NUM_UNKNOWN_ROWS = 2
"""Rows of which nothing is known beside the list's own: stage inject puts core and image there."""

NUM_MEASURED = 2_000
"""Lists by whose mean and spread the adapter's input is standardised."""

DROP_RATE = 0.05
"""Rate of each of three drops for classifier-free guidance: the list, the subject, both."""

PLAN = LoopPlan(
    batch_size=32, steps=4_000, learning_rate=1.5e-3, warmup=100, weight_decay=0.01, ema=0.998, every=250
)


def draw_taste(
    words: tuple[str, ...], *, groups: dict[str, tuple[str, ...]], rng: np.random.Generator
) -> tuple[str, ...]:
    """Attributes of somebody who would like a picture: its own of at least half the groups, and others.

    Args:
        words: the picture's, one of each group.
        groups: values of every group.
        rng: draws everything, but not the order.
    """
    fewest = (len(words) + 1) // 2
    named = rng.permutation(len(words))[: int(rng.integers(fewest, len(words) + 1))]
    taste = [words[i] for i in named.tolist()]
    for own in list(taste):
        others = next([v for v in values if v != own] for values in groups.values() if own in values)
        if others and rng.random() < SECOND_RATE:
            taste.append(others[int(rng.integers(len(others)))])
    return tuple(taste)


def train_adapter(
    data: CaptionedImages,
    staged: CaptionedImages,
    *,
    parts: Path,
    work: Path,
    out: Path,
    latents: Path,
    plan: LoopPlan = PLAN,
) -> dict[str, object]:
    """Train over the frozen pipeline in ``parts`` and write a user adapter to ``out``.

    Args:
        data: captioned pictures.
        staged: the same subjects in the middle of any scene, :data:`STAGED_RATE` of every batch.
        parts: the pipeline folder.
        work: checkpoints.
        out: the file; its one part is ``aligned``, see :func:`prefgen.models.ip_adapter.begin_from`.
        latents: folder where the pictures' latents are kept, the UNet's own.
        plan: length and rate.

    Returns:
        Figures for the card.
    """
    torch.manual_seed(plan.seed)
    bundle = DiffusionBundle.load(str(parts), memory_format="channels_last")
    kept = _Kept(data, staged, parts=parts, vae=bundle.vae, latents=latents)
    width = bundle.cross_width
    adapter = UserAdapter(
        bundle.unet, shape=FusionShape(parts=("aligned",), widths=(width,), cross_width=width)
    )
    texts = kept.tastes(NUM_MEASURED, rng=np.random.default_rng([plan.seed, 1]))
    adapter.fusion.standardise({"aligned": texts})
    adapter.fusion.begin_in_text_space(texts)
    adapter.attention.install()
    matrices = [parameter for parameter in adapter.attention.parameters() if parameter.ndim == 2]
    loop = Loop(adapter, plan=plan, folder=work, matrices=matrices)

    def loss(step: int, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        batch = kept.draw(plan.batch_size, rng=rng)
        tokens = adapter.tokens({"aligned": batch.tastes}, keep={"aligned": batch.known})
        unknown = adapter.null_tokens(plan.batch_size).repeat(1, NUM_UNKNOWN_ROWS, 1)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            adapter.attention.set(torch.cat([tokens, unknown], dim=1))
            return bundle.denoise(noisy, timesteps=timesteps, text=bundle.encode_text(batch.prompts))

        value = denoising_loss(predict, batch.latents, schedule=bundle.schedule, generator=generator)
        return {"loss": value}

    loop.run(loss, title="adapter")
    loop.use_average()
    for parameter in adapter.parameters():
        parameter.data = parameter.data.half()  # as the rest of the foundation
    lineage = {name: hash_folder(parts / name) for name in ("unet", "text_encoder")}
    save_user_adapter(adapter, path=out, lineage=lineage)
    return {
        "staged": len(staged),
        "parameters": sum(adapter.num_parameters().values()),
        "lineage": lineage,
        "history": loop.history,
    }


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Clean latents (B,4,h,w), subjects, tastes (B,Dcross) and which of them are known (B,)."""

    latents: Tensor
    prompts: list[str]
    tastes: Tensor
    known: Tensor


class _Kept:
    """Encoded pictures of both kinds, and the text space of their attributes."""

    def __init__(self, *pictures: CaptionedImages, parts: Path, vae: AutoencoderKL, latents: Path) -> None:
        self._pictures = pictures
        self._latents = [latents_of(some, vae=vae, work=latents) for some in pictures]
        self._space = TextSpace.load(parts)

    def tastes(self, count: int, *, rng: np.random.Generator) -> Tensor:
        """(count,Dcross) of random pictures."""
        rows = rng.integers(len(self._pictures[0]), size=count).tolist()
        return self._space.encode([self._taste(self._pictures[0], row, rng=rng) for row in rows])

    def draw(self, batch_size: int, *, rng: np.random.Generator) -> _Batch:
        staged = round(STAGED_RATE * batch_size)
        latents, prompts, tastes = [], [], []
        for which, count in enumerate((batch_size - staged, staged)):
            pictures = self._pictures[which]
            rows = rng.integers(len(pictures), size=count)
            latents.append(self._latents[which][torch.from_numpy(rows)].float())
            prompts += [pictures.prompts[row] for row in rows.tolist()]
            tastes += [self._taste(pictures, row, rng=rng) for row in rows.tolist()]
        drop = rng.random(batch_size) // DROP_RATE  # 0: subject, 1: taste, 2: both
        return _Batch(
            latents=torch.cat(latents),
            prompts=["" if kind in (0, 2) else prompt for kind, prompt in zip(drop, prompts, strict=True)],
            tastes=self._space.encode(tastes),
            known=torch.from_numpy((drop != 1) & (drop != 2)),
        )

    def _taste(self, pictures: CaptionedImages, row: int, *, rng: np.random.Generator) -> str:
        words = draw_taste(pictures.attributes[row], groups=pictures.groups, rng=rng)
        return self._space.draw_list(words, rng=rng)
