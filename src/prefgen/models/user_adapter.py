"""The trained part of stage inject as one module: fusion and user attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prefgen.errors import CheckpointError
from prefgen.models.artefact_file import ArtefactKind
from prefgen.models.fusion import FusionShape, PartName, UserFusion, count_parameters
from prefgen.models.projector import SemProjector
from prefgen.models.user_attention import UserAttention

KIND = ArtefactKind(name="user adapter", key="prefgen_user_adapter", version=1, stage="inject")
"""``user_adapter.safetensors``."""


class UserAdapter(nn.Module):
    """Fusion and the user branch of every cross-attention; its state dict is ``user_adapter.safetensors``.

    Args:
        unet: the frozen UNet it is made for; the branch starts from its text projections.
        shape: parts, their widths, and the UNet's cross-attention width.

    Raises:
        CheckpointError: the shape was made for a UNet of another cross-attention width.
    """

    def __init__(self, unet: object, *, shape: FusionShape) -> None:
        super().__init__()
        self.fusion = UserFusion(shape)
        self.attention = UserAttention(unet)
        widths = {layer.to_k_user.in_features for layer in self.attention.branches}
        if widths != {shape.cross_width}:
            raise CheckpointError(
                f"user adapter of cross-attention width {shape.cross_width} for a UNet of {sorted(widths)}"
            )

    def tokens(
        self, parts: Mapping[PartName, Tensor], *, keep: Mapping[PartName, Tensor] | None = None
    ) -> Tensor:
        """``user_embeds`` (B,num_user_tokens,Dcross) of a batch of parts; see ``UserFusion.rows``."""
        embeds: Tensor = self.fusion(self.fusion.rows(parts, keep=keep))
        return embeds

    def null_tokens(self, batch_size: int = 1) -> Tensor:
        """Tokens of the user of whom nothing is known, for the unconditional branch."""
        embeds: Tensor = self.fusion(self.fusion.null_rows(batch_size))
        return embeds

    def num_parameters(self) -> dict[str, int]:
        """Trainable numbers in the fusion and in the UNet's new projections."""
        return {"fusion": count_parameters([self.fusion]), "attention": count_parameters([self.attention])}


@dataclass(frozen=True, kw_only=True)
class LoadedUserAdapter:
    """What ``user_adapter.safetensors`` holds.

    Attributes:
        adapter: frozen, in evaluation mode, not installed yet: ``adapter.attention.install()``.
        lineage: part -> hash of the models it depends on.
        projector: sem into the text space, where the file carries one, as an exported file does.
    """

    adapter: UserAdapter
    lineage: dict[str, str]
    projector: SemProjector | None = None


def save_user_adapter(adapter: UserAdapter, *, path: Path, lineage: Mapping[str, str]) -> None:
    """Write ``user_adapter.safetensors``: the trained part and fixed statistics.

    Args:
        adapter: what to write.
        path: the file.
        lineage: part -> hash of the models it depends on.
    """
    header = {
        "shape": asdict(adapter.fusion.shape),
        "layers": list(adapter.attention.names),
        "lineage": dict(lineage),
    }
    KIND.write(path, tensors=adapter.state_dict(), header=header)


def read_shape(header: Mapping[str, Any]) -> FusionShape:
    """The fusion's shape from a header."""
    shape = header["shape"]
    return FusionShape(
        parts=tuple(shape["parts"]), widths=tuple(shape["widths"]), cross_width=shape["cross_width"]
    )


def load_user_adapter(path: Path, *, unet: object) -> LoadedUserAdapter:
    """Read ``user_adapter.safetensors`` for a UNet.

    Raises:
        CheckpointError: absent, torn, of another kind or version, or trained for a UNet of other layers.
    """
    header, tensors = KIND.read(path)
    with KIND.fitting(path):
        adapter = UserAdapter(unet, shape=read_shape(header))
        if list(adapter.attention.names) != header["layers"]:
            raise CheckpointError(f"{path} was trained for a UNet of other layers; use the pipeline it names")
        adapter.load_state_dict(tensors)
        adapter.requires_grad_(False).eval()
        return LoadedUserAdapter(adapter=adapter, lineage=header["lineage"])
