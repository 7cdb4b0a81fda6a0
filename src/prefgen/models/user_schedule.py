"""When and where the user branch is how strong: over the denoising steps, and over the UNet's blocks.

Neither is the paper's, which knows one lambda. Early steps decide the composition, late ones colour and
surface, and the blocks of a UNet share the work in like manner: what of it a user decides can be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prefgen.errors import DataError

ScheduleShape = Literal["constant", "linear", "early", "late"]
SCHEDULE_SHAPES: tuple[ScheduleShape, ...] = get_args(ScheduleShape)


@dataclass(frozen=True, kw_only=True)
class UserSchedule:
    """A factor on every ``user_scale``, step by step; outside the window it is 0, the base model.

    Attributes:
        shape: over the steps of the window: ``constant`` is 1, ``linear`` rises evenly from 0 at the first
            step to 1 at the last, ``early`` is 1 in the first half and 0 after, ``late`` the other way round.
        start: fraction of the steps in [0,1] at which the window begins.
        until: fraction at which it ends, above ``start``.
    """

    shape: ScheduleShape = "constant"
    start: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a window that is none.

        Raises:
            DataError: an unknown shape, or fractions that are not 0 <= start < until <= 1.
        """
        if self.shape not in SCHEDULE_SHAPES:
            raise DataError(f"schedule {self.shape!r} is not one of {', '.join(SCHEDULE_SHAPES)}")
        if not 0 <= self.start < self.until <= 1:
            raise DataError(
                f"the user branch works from {self.start:g} until {self.until:g} of the steps; "
                "0 <= from < until <= 1 is needed"
            )

    @property
    def is_plain(self) -> bool:
        """Whether every factor is 1."""
        return self == CONSTANT

    def factors(self, num_steps: int) -> tuple[float, ...]:
        """One factor in [0,1] a step, noisiest step first; a step belongs where its middle lies."""
        inside = [i for i in range(num_steps) if self.start <= (i + 0.5) / num_steps < self.until]
        factors = [0.0] * num_steps
        for number, step in enumerate(inside):
            factors[step] = self._inside(number, count=len(inside))
        return tuple(factors)

    def _inside(self, number: int, *, count: int) -> float:
        if self.shape == "linear":
            return number / (count - 1) if count > 1 else 1.0
        first_half = (number + 0.5) / count < 0.5
        if self.shape == "early":
            return float(first_half)
        return float(not first_half) if self.shape == "late" else 1.0


CONSTANT = UserSchedule()
"""The user at full strength at every step: how stage inject draws."""


def check_negative_scale(scale: float, *, guidance_scale: float) -> None:
    """Refuse a strength of the disliked side that nothing could come of.

    Raises:
        DataError: it is not finite, or there is no unconditional branch.
    """
    if not math.isfinite(scale):
        raise DataError(f"negative_user_scale must be finite, got {scale}")
    if scale and not guidance_scale > 1:
        raise DataError(
            f"negative_user_scale {scale:g} works in the unconditional branch of classifier-free guidance, "
            f"which guidance_scale {guidance_scale:g} switches off; pass a guidance_scale above 1 or 0 for it"
        )


def layer_factors(names: Sequence[str], *, blocks: Mapping[str, float]) -> tuple[float, ...]:
    """A factor on ``user_scale`` for each cross-attention.

    Args:
        names: of the processors, such as ``down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor``.
        blocks: beginning of a name (``down``, ``mid``, ``up_blocks.1``) -> factor. The longest that fits
            decides; a layer that none fits keeps 1.

    Raises:
        DataError: a beginning fits no layer, or a factor is not finite.
    """
    for prefix, factor in blocks.items():
        if not math.isfinite(factor):
            raise DataError(f"scale of block {prefix!r} must be a finite number, got {factor}")
        if not any(_fits(name, prefix=prefix) for name in names):
            known = sorted({".".join(name.split(".")[:2]).removesuffix(".attentions") for name in names})
            raise DataError(f"no cross-attention is in block {prefix!r}; this UNet has {', '.join(known)}")
    return tuple(_factor(name, blocks=blocks) for name in names)


def _factor(name: str, *, blocks: Mapping[str, float]) -> float:
    fitting = [prefix for prefix in blocks if _fits(name, prefix=prefix)]
    return float(blocks[max(fitting, key=len)]) if fitting else 1.0


def _fits(name: str, *, prefix: str) -> bool:
    # "up_blocks.1" must not take "up_blocks.10" along.
    rest = name[len(prefix) :]
    return bool(prefix) and name.startswith(prefix) and not (prefix[-1].isdigit() and rest[:1].isdigit())
