"""The parts of a user's taste as tokens of the UNet's cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prefgen.errors import CheckpointError

PartName = Literal["aligned", "core", "image"]
PART_NAMES: tuple[PartName, ...] = ("aligned", "core", "image")
TOKENS_PER_PART = 4
"""diffusers hard-codes this number for an adapter of the form Linear + LayerNorm."""

_VARIANCE_FLOOR = 0.01


@dataclass(frozen=True, kw_only=True)
class FusionShape:
    """What has to be known to rebuild a :class:`UserFusion`.

    Attributes:
        parts: the rows in order; a part may come twice (image-only with equal token count repeats ``image``).
        widths: width of each row's part.
        cross_width: Dcross.
    """

    parts: tuple[PartName, ...]
    widths: tuple[int, ...]
    cross_width: int

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.widths):
            raise CheckpointError(f"fusion has {len(self.parts)} parts and {len(self.widths)} widths")
        unknown = [part for part in self.parts if part not in PART_NAMES]
        if unknown:
            raise CheckpointError(f"fusion part {unknown[0]!r} is not one of {', '.join(PART_NAMES)}")
        if min(*self.widths, self.cross_width) < 1:
            raise CheckpointError(f"fusion widths {self.widths}, {self.cross_width} must be above 0")

    @property
    def num_user_tokens(self) -> int:
        """Tokens that cross-attention sees."""
        return TOKENS_PER_PART * len(self.parts)

    def spans(self) -> list[tuple[PartName, slice]]:
        """Each row's part and its place among the inputs of the Linear."""
        spans, start = [], 0
        for part, width in zip(self.parts, self.widths, strict=True):
            spans.append((part, slice(start, start + width)))
            start += width
        return spans


class UserFusion(nn.Module):
    """One Linear and one LayerNorm over rows that each hold one part and zeros elsewhere.

    ``e_u = [aligned ; core ; image]`` (method step 4) becomes the rows aligned|0|0, 0|core|0, 0|0|image; each
    gives four tokens. This is the form of IP-Adapter's image projection, so a stock diffusers pipeline loads
    it without loss. A part is dropped by zeroing its row, never its tokens: bias and LayerNorm make tokens
    of a zero row too, and those are what the model learns as "not known".

    Each part is standardised by fixed statistics of the training users first: hidden states of a language
    model share a mean far larger than what tells users apart, and LayerNorm would keep it.
    """

    def __init__(self, shape: FusionShape) -> None:
        super().__init__()
        self.shape = shape
        total = sum(shape.widths)
        self.proj = nn.Linear(total, TOKENS_PER_PART * shape.cross_width)
        self.norm = nn.LayerNorm(shape.cross_width)
        self.mean = nn.Buffer(torch.zeros(total))
        self.scale = nn.Buffer(torch.ones(total))

    @torch.no_grad()
    def standardise(self, samples: Mapping[PartName, Tensor]) -> None:
        """Set the fixed statistics from training users, once, before the first step.

        Args:
            samples: for each part (N,D), N >= 2; a part left out keeps the statistics it has. Coordinates
                that hardly move are not blown up to unit variance: a hundredth of the part's mean variance is
                added to each.
        """
        for part, span in self.shape.spans():
            if part not in samples:
                continue
            values = samples[part].double()
            variance = values.var(dim=0)
            floor = _VARIANCE_FLOOR * variance.mean().clamp_min(1e-12)
            self.mean[span] = values.mean(dim=0).float()
            self.scale[span] = (variance + floor).sqrt().float()

    @torch.no_grad()
    def begin_in_text_space(self, aligned: Tensor) -> None:
        """Let tokens of the aligned rows begin as the aligned embeddings themselves, before the first step.

        Stage align has carried them into the space that the text projections read, of which the user branch
        starts from copies; behind a random Linear they would be strangers there. To the Linear's random
        start, which tells the four tokens apart, it adds what undoes the standardisation; the LayerNorm
        begins with the embeddings' own mean and deviation. Rows of the other parts, and of unknown users,
        begin around the mean embedding. Not in the paper: ours.

        Args:
            aligned: (N,Dcross) of training users, after :meth:`standardise`.

        Raises:
            CheckpointError: the embeddings have another width than the UNet's text.
        """
        width = self.shape.cross_width
        if aligned.shape[1:] != (width,):
            raise CheckpointError(
                f"aligned embeddings of width {aligned.shape[-1]} cannot begin as text of width {width}"
            )
        for part, span in self.shape.spans():
            if part == "aligned":
                back = torch.diag(self.scale[span]).repeat(TOKENS_PER_PART, 1)
                self.proj.weight[:, span].add_(back)
                self.proj.bias.add_(self.mean[span].repeat(TOKENS_PER_PART))
        self.norm.weight.fill_(float(aligned.float().std(dim=1, correction=0).mean()))
        self.norm.bias.fill_(float(aligned.float().mean()))

    def rows(
        self, parts: Mapping[PartName, Tensor], *, keep: Mapping[PartName, Tensor] | None = None
    ) -> Tensor:
        """The input of the Linear; also what a stock pipeline takes as ``ip_adapter_image_embeds``.

        Args:
            parts: (B,D) for each part in use; a part left out is dropped for the whole batch.
            keep: optional (B,) bool for each part; False drops it for that user.

        Returns:
            (B,P,sum of widths) float32.

        Raises:
            CheckpointError: a part has another width than the adapter was trained with, or none is given.
        """
        given = [parts[name] for name in self.shape.parts if name in parts]
        if not given:
            raise CheckpointError(
                f"a user needs at least one of {', '.join(dict.fromkeys(self.shape.parts))}"
            )
        rows = self.mean.new_zeros(len(given[0]), len(self.shape.parts), len(self.mean))
        for index, (part, span) in enumerate(self.shape.spans()):
            if part not in parts:
                continue
            values = parts[part].to(self.mean)
            if values.shape[1:] != (span.stop - span.start,):
                raise CheckpointError(
                    f"{part} embedding of width {values.shape[-1]} for a user adapter of "
                    f"{span.stop - span.start}: it was made by other models"
                )
            values = (values - self.mean[span]) / self.scale[span]
            if keep is not None and part in keep:
                values = torch.where(keep[part].to(values.device)[:, None], values, 0.0)
            rows[:, index, span] = values
        return rows

    def null_rows(self, batch_size: int) -> Tensor:
        """(B,P,sum of widths) zeros: the user of whom nothing is known."""
        return self.mean.new_zeros(batch_size, len(self.shape.parts), len(self.mean))

    def forward(self, rows: Tensor) -> Tensor:
        """``user_embeds`` (B,4P,Dcross) of rows (B,P,sum of widths)."""
        tokens: Tensor = self.norm(self.proj(rows).unflatten(-1, (TOKENS_PER_PART, -1)))
        return tokens.flatten(1, 2)


def count_parameters(modules: Sequence[nn.Module]) -> int:
    """Trainable numbers in some modules."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
