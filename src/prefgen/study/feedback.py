"""Training-free feedback: references inside the UNet's self-attention, after FABRIC (arXiv 2307.10159).

At each of the noisier steps the user's references, noised to that step, go through the UNet without a prompt;
what its self-attention layers are given is kept, and the picture's own self-attention then looks at it too:
at the liked references in the conditional rows, at the disliked ones in the unconditional rows, so that
guidance leads towards the first and away from the second. Nothing is trained. Weight, number of references
and the share of steps are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor

from prefgen.models.diffusion import DiffusionBundle, TextCondition
from prefgen.models.sampling import sample
from prefgen.schema import SIDES, Side
from prefgen.study.drawing import DrawSettings, Studio, rounded
from prefgen.study.users import StudyUser

SELF_ATTENTION = "attn1.processor"
"""How diffusers names the processors of self-attention."""

_NOISE_SEED = 977


@dataclass(frozen=True, kw_only=True)
class References:
    """Encoded references of B pictures' users, one side.

    Attributes:
        latents: (B,R,C,h,w) in the UNet's scale.
        present: (B,R) bool: users with fewer than R references are filled up.
    """

    latents: Tensor
    present: Tensor


class Memory:
    """What the self-attention layers were given by the references, and what they do now."""

    def __init__(self, *, weight: float) -> None:
        self.weight = weight
        self.mode: Literal["rest", "record", "attend"] = "rest"
        self.side: Side = "liked"
        self.guided = True
        self.states: dict[tuple[str, Side], Tensor] = {}
        self.present: dict[Side, Tensor] = {}

    def keys(self, name: str, own: Tensor) -> tuple[Tensor, Tensor]:
        """States to look at (rows,S + R S,D), and what is added to their scores (rows,1,S + R S)."""
        sides: tuple[Side, ...] = ("disliked", "liked") if self.guided else ("liked",)
        states, bias = [], []
        for side in sides:
            count, number = self.present[side].shape
            kept = self.states[name, side]
            states.append(kept.reshape(count, number * kept.shape[1], kept.shape[2]))
            scores = torch.where(self.present[side], math.log(self.weight), -math.inf)
            bias.append(scores.repeat_interleave(kept.shape[1], dim=1))
        added = torch.cat(bias).to(own)
        return (
            torch.cat([own, torch.cat(states).to(own)], dim=1),
            torch.cat([added.new_zeros(len(own), own.shape[1]), added], dim=1)[:, None],
        )


class FeedbackProcessor:
    """Self-attention that records, or looks at what was recorded; at rest it is the base model."""

    def __init__(self, base: Any, *, memory: Memory, name: str) -> None:
        self.base, self.memory, self.name = base, memory, name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As ``AttnProcessor2_0`` without a mask of its own."""
        if self.memory.mode == "record":
            self.memory.states[self.name, self.memory.side] = hidden_states
        elif self.memory.mode == "attend":
            encoder_hidden_states, attention_mask = self.memory.keys(self.name, hidden_states)
        return cast(
            Tensor, self.base(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        )


@dataclass(frozen=True, kw_only=True)
class FeedbackBundle(DiffusionBundle):
    """A pipeline whose every prediction has looked at references first.

    Attributes:
        memory: shared with the processors in the UNet.
        references: of each side; B users as in the batch that is drawn.
        until: share of the noise schedule in which they are looked at.
    """

    memory: Memory
    references: dict[Side, References]
    until: float

    def denoise(self, latents: Tensor, *, timesteps: Tensor, text: TextCondition) -> Tensor:
        """As :meth:`DiffusionBundle.denoise`; rows are B, or 2B under classifier-free guidance."""
        memory, early = self.memory, float(timesteps) >= (1 - self.until) * len(self.schedule)
        if not early:
            return DiffusionBundle.denoise(self, latents, timesteps=timesteps, text=text)
        memory.guided = len(latents) == 2 * len(self.references["liked"].latents)
        try:
            for side, found in self.references.items():
                if side == "liked" or memory.guided:
                    self._record(found, side=side, timesteps=timesteps)
            memory.mode = "attend"
            return DiffusionBundle.denoise(self, latents, timesteps=timesteps, text=text)
        finally:
            memory.mode = "rest"
            memory.states.clear()

    def _record(self, found: References, *, side: Side, timesteps: Tensor) -> None:
        self.memory.mode, self.memory.side = "record", side
        self.memory.present[side] = found.present
        flat = found.latents.flatten(0, 1)
        noise = torch.randn(flat.shape[1:], generator=torch.Generator().manual_seed(_NOISE_SEED)).to(flat)
        noisy = self.schedule.add(
            flat, noise=noise.expand_as(flat), timesteps=timesteps.reshape(1).expand(len(flat))
        )
        nothing = self.encode_nothing(1)
        text = TextCondition(
            hidden=nothing.hidden.expand(len(flat), -1, -1), pooled=nothing.pooled.expand(len(flat), -1)
        )
        DiffusionBundle.denoise(self, noisy, timesteps=timesteps, text=text)


def encode_references(
    users: Sequence[StudyUser], *, bundle: DiffusionBundle, side: Side, count: int
) -> References:
    """The first ``count`` references of each user's profile on one side, encoded; the rest is zeros."""
    latents = torch.zeros(len(users), count, *bundle.latent_shape, device=bundle.device)
    present = torch.zeros(len(users), count, dtype=torch.bool, device=bundle.device)
    for row, user in enumerate(users):
        shown = user.shown(side)[:count]
        if shown:
            pixels = user.liked if side == "liked" else user.disliked
            mean = bundle.encode_moments(pixels[shown]).mean.float()
            latents[row, : len(shown)] = mean * bundle.vae.config.scaling_factor
            present[row, : len(shown)] = True
    return References(latents=latents, present=present)


@torch.no_grad()
def draw_with_feedback(
    studio: Studio,
    users: Sequence[StudyUser],
    *,
    settings: DrawSettings,
    count: int,
    weight: float,
    until: float,
    progress: Callable[[int], object],
) -> Tensor:
    """(U,P,3,H,W) pictures of the users' prompts from their own noise, rounded to 8 bits.

    Args:
        studio: the pipeline; its UNet is left as it was.
        users: U users with P prompts each.
        settings: steps, guidance, batch size.
        count: references of either side.
        weight: of a reference's states beside the picture's own.
        until: share of the noise schedule in which references are looked at.
        progress: called with the number of pictures just drawn.
    """
    bundle, memory = studio.bundle, Memory(weight=weight)
    processors = dict(bundle.unet.attn_processors)
    own = {
        name: FeedbackProcessor(base, memory=memory, name=name) if name.endswith(SELF_ATTENTION) else base
        for name, base in processors.items()
    }
    parts = {field.name: getattr(bundle, field.name) for field in fields(bundle)}
    references = {side: encode_references(users, bundle=bundle, side=side, count=count) for side in SIDES}
    jobs = [(row, i) for row, user in enumerate(users) for i in range(len(user.prompts))]
    drawn = []
    bundle.unet.set_attn_processor(own)
    try:
        for start in range(0, len(jobs), settings.batch_size):
            batch = jobs[start : start + settings.batch_size]
            rows = [row for row, _ in batch]
            shown: dict[Side, References] = {
                side: References(latents=found.latents[rows], present=found.present[rows])
                for side, found in references.items()
            }
            pixels = sample(
                FeedbackBundle(**parts, memory=memory, references=shown, until=until),
                [users[row].prompts[i] for row, i in batch],
                seeds=[users[row].seeds[i] for row, i in batch],
                num_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
            )
            drawn.append(rounded(pixels))
            progress(len(pixels))
    finally:
        bundle.unet.set_attn_processor(processors)
    pictures = torch.cat(drawn)
    return pictures.reshape(len(users), -1, *pictures.shape[1:])
