"""The network of stage align: a user's ``sem_embeds`` mapped into the text space of the diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prefgen.errors import CheckpointError
from prefgen.models.artefact_file import ArtefactKind

KIND = ArtefactKind(name="projector", key="projector", version=1, stage="align")
"""``projector.safetensors``."""

_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """What has to be known to rebuild a :class:`SemProjector`; stored in the artefact's header.

    Attributes:
        sem_width: Dsem, width of ``sem_embeds``.
        text_width: Dtext, width of the frozen text encoder's embedding.
        hidden_width: width between the two linear layers.
    """

    sem_width: int
    text_width: int
    hidden_width: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20:
                raise CheckpointError(
                    f"projector {name} must be a whole number from 1 to 1048576, got {value!r}"
                )


class SemProjector(nn.Module):
    """MLP of stage 3: LayerNorm, Linear, GELU, Linear between a fixed standardisation and its inverse.

    The input is standardised per coordinate, because hidden states of a language model hold a few coordinates
    hundreds of times larger than the rest, which a LayerNorm alone would let rule. The output is shifted by
    the mean text embedding and scaled by ONE number, the root mean square deviation from that mean:
    per-coordinate scales would bend the geometry in which the kernel measures.

    The paper says only "a small MLP" (method step 3); this form is ours.
    """

    sem_mean: Tensor
    sem_scale: Tensor
    text_mean: Tensor
    text_scale: Tensor

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.sem_width)
        self.up = nn.Linear(shape.sem_width, shape.hidden_width)
        self.activation = nn.GELU()
        self.down = nn.Linear(shape.hidden_width, shape.text_width)
        self.register_buffer("sem_mean", torch.zeros(shape.sem_width))
        self.register_buffer("sem_scale", torch.ones(shape.sem_width))
        self.register_buffer("text_mean", torch.zeros(shape.text_width))
        self.register_buffer("text_scale", torch.ones(()))

    @torch.no_grad()
    def standardise(self, sem: Tensor, *, text: Tensor) -> None:
        """Set the fixed statistics from training users, once, before the first step.

        Args:
            sem: (N,Dsem) sem embeddings, N >= 2.
            text: (M,Dtext) text embeddings, M >= 2.
        """
        sem64, text64 = sem.double(), text.double()
        self.sem_mean.copy_(sem64.mean(dim=0))
        scale = sem64.std(dim=0)
        # A coordinate that never moves carries nothing; dividing by its zero would carry infinities instead.
        floor = _SMALLEST_SCALE * max(float(scale.max()), _SMALLEST_SCALE)
        self.sem_scale.copy_(torch.where(scale > floor, scale, torch.ones_like(scale)))
        mean = text64.mean(dim=0)
        self.text_mean.copy_(mean)
        spread = (text64 - mean).pow(2).sum(dim=1).mean().div(text64.shape[1]).sqrt()
        self.text_scale.copy_(spread.clamp_min(_SMALLEST_SCALE))

    def forward(self, sem: Tensor) -> Tensor:
        """(N,Dsem) -> ``aligned_embeds`` (N,Dtext), in the units of the text encoder."""
        hidden: Tensor = self.norm((sem - self.sem_mean) / self.sem_scale)
        hidden = self.down(self.activation(self.up(hidden)))
        return self.text_mean + self.text_scale * hidden


@dataclass(frozen=True, kw_only=True)
class LoadedProjector:
    """What ``projector.safetensors`` holds.

    Attributes:
        projector: frozen, in evaluation mode.
        lineage: part -> hash of the models whose embeddings it was trained on.
        text: which text encoder of the pipeline and which pooling it maps into.
    """

    projector: SemProjector
    lineage: dict[str, str]
    text: dict[str, str]


def save_projector(
    projector: SemProjector, *, path: Path, lineage: Mapping[str, str], text: Mapping[str, str]
) -> None:
    """Write ``projector.safetensors``.

    Args:
        projector: what to write.
        path: the file.
        lineage: part -> hash of the models it depends on.
        text: which text encoder and pooling it maps into.
    """
    header = {"shape": asdict(projector.shape), "lineage": dict(lineage), "text": dict(text)}
    KIND.write(path, tensors=projector.state_dict(), header=header)


def load_projector(path: Path) -> LoadedProjector:
    """Read ``projector.safetensors``.

    Raises:
        CheckpointError: absent, torn, of another kind or version, or with other tensors than its header says.
    """
    header, tensors = KIND.read(path)
    with KIND.fitting(path):
        projector = SemProjector(ProjectorShape(**header["shape"]))
        projector.load_state_dict(tensors)
        projector.requires_grad_(False).eval()
        return LoadedProjector(projector=projector, lineage=header["lineage"], text=header["text"])
