"""The IP-Adapter file format (arXiv 2308.06721), there and back: what ``pipe.load_ip_adapter`` reads.

``image_proj.*`` is the fusion's Linear and LayerNorm; ``ip_adapter.N.to_k_ip.weight`` and its twin with v are
the user projections, with N = 1, 3, 5 .. in the order of the UNet's cross-attentions: numbers of a list of
all processors, where every other one is a self-attention. Stock loaders pass over any other name, so an
export also carries, under ``prefgen.*``, what makes a profile its input: statistics and projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefgen.errors import CheckpointError
from prefgen.models.artefact_file import ArtefactKind
from prefgen.models.fusion import FusionShape, PartName
from prefgen.models.projector import KIND as PROJECTOR
from prefgen.models.projector import ProjectorShape, SemProjector
from prefgen.models.user_adapter import KIND, LoadedUserAdapter, UserAdapter, load_user_adapter, read_shape

EXPORT = ArtefactKind(name="IP-Adapter", key="prefgen_ip_adapter", version=1, stage="inject")
"""``ip_adapter.safetensors`` as prefgen writes it; files of others carry no header."""

_IMAGE_PROJ = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
_NEAR_NOTHING = 0.1
"""Share of their random start that columns keep of a part that comes twice and is new to the file."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter's numbers, from whichever kind of file.

    Attributes:
        path: the file.
        shape: of its fusion; a file of others reads one image embedding.
        state: named as in ``UserAdapter.state_dict``, statistics included: mean 0 and scale 1 in a file of
            others, whose embeddings go in as they are.
        layers: names of the UNet's processors it was made for; a file of others does not tell them.
        lineage: part -> hash; empty in a file of others.
        projector: sem into the text space, where the file carries one.
    """

    path: Path
    shape: FusionShape
    state: dict[str, Tensor]
    layers: tuple[str, ...]
    lineage: dict[str, str]
    projector: SemProjector | None = None

    @property
    def num_layers(self) -> int:
        """Cross-attentions of the UNet it was made for."""
        return sum(name.endswith("to_k_user.weight") for name in self.state)


def ip_adapter_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stock names of an adapter's state dict.

    A user is passed as ``ip_adapter_image_embeds=[rows]`` of ``UserFusion.rows``, with the zero rows of
    ``null_rows`` before it under classifier-free guidance; ``user_scale`` is ``set_ip_adapter_scale``.
    """
    tensors = {f"image_proj.{name}": state[f"fusion.{name}"] for name in _IMAGE_PROJ}
    num_layers = sum(name.endswith("to_k_user.weight") for name in state)
    for layer in range(num_layers):
        for kind in ("k", "v"):
            stock = f"ip_adapter.{2 * layer + 1}.to_{kind}_ip.weight"
            tensors[stock] = state[f"attention.layers.{layer}.to_{kind}_user.weight"]
    return tensors


def export_ip_adapter(
    adapter: Path, *, path: Path, projector: Path | None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Write ``user_adapter.safetensors`` as a file that stock diffusers loads; no UNet is needed for it.

    Args:
        adapter: artefact of stage inject.
        path: the file to write.
        projector: artefact of stage align, to go along; None where the adapter does not read ``aligned``.
        dtype: of the stock tensors; below float32 the images are no longer ours to the last bit.

    Returns:
        The header: ``shape``, ``layers``, ``lineage``, ``projector``.

    Raises:
        CheckpointError: an artefact is absent, torn or of another kind.
    """
    header, state = KIND.read(adapter)
    with KIND.fitting(adapter):
        tensors = {name: value.to(dtype) for name, value in ip_adapter_tensors(state).items()}
        own = {f"prefgen.fusion.{name}": state[f"fusion.{name}"] for name in ("mean", "scale")}
    header = {name: header[name] for name in ("shape", "layers", "lineage")}
    header["projector"] = None
    if projector is not None:
        facts, weights = PROJECTOR.read(projector)
        header["projector"] = {"shape": facts["shape"], "text": facts["text"]}
        own |= {f"prefgen.projector.{name}": value for name, value in weights.items()}
    EXPORT.write(path, tensors=tensors | own, header=header)
    return header


def read_adapter(path: Path) -> AdapterSource:
    """Read an adapter file of any kind: prefgen's own, prefgen's export, or an IP-Adapter of others.

    Raises:
        CheckpointError: absent, pickled, torn, or of a form that has no Linear + LayerNorm over one vector.
    """
    keys = _headers(path)
    if KIND.key in keys:
        header, state = KIND.read(path)
        with KIND.fitting(path):
            return AdapterSource(
                path=path,
                shape=read_shape(header),
                state=state,
                layers=tuple(header["layers"]),
                lineage=header["lineage"],
            )
    return _read_export(path) if EXPORT.key in keys else _read_foreign(path)


def _headers(path: Path) -> frozenset[str]:
    """Names of a file's headers, which tell its kind."""
    if path.suffix in _PICKLED:
        raise CheckpointError(
            f"{path} is pickled and could run code when read; pass the adapter's .safetensors file"
        )
    if not path.is_file():
        raise CheckpointError(f"no adapter at {path}; pass the .safetensors file of one")
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no adapter or torn: {str(error).splitlines()[0]}") from None


def _read_export(path: Path) -> AdapterSource:
    header, tensors = EXPORT.read(path)
    with EXPORT.fitting(path):
        state = _own_names(tensors)
        state |= {f"fusion.{name}": tensors[f"prefgen.fusion.{name}"] for name in ("mean", "scale")}
        projector = None
        if header["projector"] is not None:
            projector = SemProjector(ProjectorShape(**header["projector"]["shape"]))
            prefix = "prefgen.projector."
            projector.load_state_dict(
                {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            )
            projector.requires_grad_(False).eval()
        return AdapterSource(
            path=path,
            shape=read_shape(header),
            state=state,
            layers=tuple(header["layers"]),
            lineage=header["lineage"],
            projector=projector,
        )


def _read_foreign(path: Path) -> AdapterSource:
    with EXPORT.fitting(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
    found = sorted(name for name in tensors if name.startswith("image_proj."))
    if found != sorted(f"image_proj.{name}" for name in _IMAGE_PROJ):
        what = f"its image_proj holds {', '.join(found[:3])} .." if found else "it holds no image_proj"
        raise CheckpointError(
            f"{path}: {what}; only IP-Adapters over one image embedding (Linear + LayerNorm: "
            f"{', '.join(_IMAGE_PROJ)}) can be taken over, not the plus, full or face ones"
        )
    with EXPORT.fitting(path):
        state = _own_names(tensors)
        tokens, width = state["fusion.proj.weight"].shape
        cross_width = len(state["fusion.norm.weight"])
        shape = FusionShape(parts=("image",), widths=(width,), cross_width=cross_width)
        if tokens != shape.num_user_tokens * cross_width:
            raise ValueError(f"{tokens} outputs are not {shape.num_user_tokens} tokens of {cross_width}")
        state |= {"fusion.mean": torch.zeros(width), "fusion.scale": torch.ones(width)}
    return AdapterSource(path=path, shape=shape, state=state, layers=(), lineage={})


def _own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Own names of the stock tensors, float32; each layer's number must be there with both kinds."""
    state = {f"fusion.{name}": tensors[f"image_proj.{name}"].float() for name in _IMAGE_PROJ}
    keys = [name for name in tensors if name.startswith("ip_adapter.")]
    for layer in range(-(-len(keys) // 2)):
        for kind in ("k", "v"):
            value = tensors[f"ip_adapter.{2 * layer + 1}.to_{kind}_ip.weight"]
            state[f"attention.layers.{layer}.to_{kind}_user.weight"] = value.float()
    return state


def load_adapter(path: Path, *, unet: object) -> LoadedUserAdapter:
    """An adapter file of any kind for a UNet, frozen; an IP-Adapter of others reads ``image`` alone.

    Raises:
        CheckpointError: as :func:`read_adapter`, or it was made for another UNet.
    """
    if KIND.key in _headers(path):
        return load_user_adapter(path, unet=unet)
    source = read_adapter(path)
    with EXPORT.fitting(path):
        adapter = UserAdapter(unet, shape=source.shape)
        _check_unet(adapter, source=source)
        adapter.load_state_dict(source.state)
    adapter.requires_grad_(False).eval()
    return LoadedUserAdapter(adapter=adapter, lineage=source.lineage, projector=source.projector)


def _check_unet(adapter: UserAdapter, *, source: AdapterSource) -> None:
    own = adapter.attention.state_dict()
    needed = len(adapter.attention.names)
    if source.num_layers != needed:
        raise CheckpointError(
            f"{source.path} has {source.num_layers} cross-attentions, this UNet has {needed}: it was made "
            "for another base model"
        )
    if source.layers not in ((), adapter.attention.names):
        raise CheckpointError(f"{source.path} was made for a UNet of other layers; use the pipeline it names")
    for name, value in own.items():
        given = source.state[f"attention.{name}"].shape
        if given != value.shape:
            raise CheckpointError(
                f"{source.path}: {name} has shape {tuple(given)}, this UNet needs {tuple(value.shape)}: "
                "it was made for another base model"
            )


@torch.no_grad()
def begin_from(adapter: UserAdapter, source: AdapterSource) -> frozenset[PartName]:
    """Start an adapter's training from a file instead of from the frozen text projections.

    A part that the file knows takes over its columns of the Linear and its statistics, so that its tokens
    are the file's. Any other part starts with zero columns, or nearly so where it comes more than once: its
    tokens are then those of "not known", and training moves them. With ``parts=image`` and an IP-Adapter of
    others the start IS that IP-Adapter.

    Args:
        adapter: as made for the UNet; changed in place.
        source: what :func:`read_adapter` found in the file.

    Returns:
        The parts whose statistics came along; :meth:`UserFusion.standardise` must leave them alone.

    Raises:
        CheckpointError: it was made for another UNet, or a part has another width.
    """
    fusion, state = adapter.fusion, source.state
    if source.shape.cross_width != fusion.shape.cross_width:
        raise CheckpointError(
            f"{source.path} makes tokens of width {source.shape.cross_width}, this UNet reads "
            f"{fusion.shape.cross_width}: it was made for another base model"
        )
    _check_unet(adapter, source=source)
    given = dict(source.shape.spans())
    for part, span in fusion.shape.spans():
        if part not in given:
            # Rows of one input and equal columns would have equal gradients, and stay one row for ever.
            fusion.proj.weight[:, span] *= _NEAR_NOTHING if fusion.shape.parts.count(part) > 1 else 0
            continue
        theirs = given[part]
        if theirs.stop - theirs.start != span.stop - span.start:
            raise CheckpointError(
                f"{source.path} reads {part} embeddings of width {theirs.stop - theirs.start}, here they "
                f"have {span.stop - span.start}: they come from another model"
            )
        fusion.proj.weight[:, span] = state["fusion.proj.weight"][:, theirs]
        fusion.mean[span], fusion.scale[span] = state["fusion.mean"][theirs], state["fusion.scale"][theirs]
    fusion.proj.bias.copy_(state["fusion.proj.bias"])
    fusion.norm.weight.copy_(state["fusion.norm.weight"])
    fusion.norm.bias.copy_(state["fusion.norm.bias"])
    prefix = "attention."
    adapter.attention.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    return frozenset(part for part, _ in fusion.shape.spans() if part in given)
