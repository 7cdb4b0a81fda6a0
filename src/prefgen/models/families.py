"""What differs between families of multimodal LLMs: the rest of prefgen is the same for all.

A family is known by the ``model_type`` in its ``config.json``. Its classes are those of transformers; images
go through the image processor on PIL (torchvision is not needed), placeholders are written by
:mod:`prefgen.models.prompts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor

from prefgen.errors import CheckpointError
from prefgen.models.mllm_pixels import Squaring
from prefgen.models.prompts import PromptFormat

FamilyName = Literal["idefics2", "idefics3", "smolvlm", "llava_onevision", "qwen2_5_vl", "qwen3_vl"]
IMAGE_SIDE_KEY = "prefgen_image_side"
"""Key in config.json: side in pixels of the square that images become, instead of the family's own. It stands
there and not among a stage's settings because features, LoRA, probes and profiles all depend on it."""

FAMILY_NAMES: tuple[FamilyName, ...] = get_args(FamilyName)

IMAGE_WRAPPING_KEY = "prefgen_image_wrapping"
"""Key in config.json: "stock", the default, writes what the family writes around an image, "bare" nothing."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        name: its ``model_type``.
        model: class in transformers.
        image_processor: module and class of the image processor on PIL.
        text: attribute of the inner model that is the language model: its ``layers`` get LoRA and are probed.
        vision: attribute of the inner model that is the vision tower.
        connectors: names of the modules between tower and language model.
        encode: (inner model, pixels (N, 3, S, S)) -> (N, K, D * streams) features of images.
        tokens: (configuration, S) -> K, placeholders an image takes.
        image_token: the placeholder.
        opening: text the family writes before an image.
        closing: and after it.
        shared_wrapping: see :class:`PromptFormat`.
        square_positions: image tokens have two-dimensional positions.
        side: side of the square in pixels unless config.json sets one; None takes the vision tower's own
            and allows no other.
        squaring: see :class:`PixelMaker`.
    """

    name: FamilyName
    model: str
    image_processor: str
    text: Literal["text_model", "language_model"]
    vision: Literal["vision_model", "vision_tower", "visual"]
    connectors: tuple[str, ...]
    encode: Callable[[Any, Tensor], Tensor]
    tokens: Callable[[Any, int], int]
    image_token: str = "<image>"
    opening: str = ""
    closing: str = ""
    shared_wrapping: bool = False
    square_positions: bool = False
    side: int | None = None
    squaring: Squaring = "pad"

    def model_class(self) -> Any:
        """The class in transformers."""
        return getattr(transformers, self.model)

    def load_image_processor(self, path: str | Path, *, side: int) -> Any:
        """The image processor of a folder; one that makes squares itself makes them of ``side`` pixels."""
        module, _, name = self.image_processor.partition(":")
        processor_class = getattr(import_module(f"transformers.models.{module}"), name)
        settings: dict[str, Any] = {}
        if self.squaring == "stock":
            edge = {"longest_edge": side}
            settings = {"do_image_splitting": False, "size": edge, "max_image_size": edge}
        return processor_class.from_pretrained(path, **settings)

    def side_of(self, config: Any) -> int:
        """Side in pixels of the square of a model: config.json's ``prefgen_image_side``, or the family's.

        Raises:
            CheckpointError: the vision tower takes another size only, or patches do not fill the square.
        """
        vision = config.vision_config
        own, wanted = getattr(vision, "image_size", None), getattr(config, IMAGE_SIDE_KEY, None)
        if self.side is None:
            if wanted not in (None, own):
                raise CheckpointError(f"{IMAGE_SIDE_KEY}={wanted}, but this {self.name} takes {own} only")
            return int(vision.image_size)
        side = int(wanted or self.side)
        step = int(vision.patch_size) * int(getattr(vision, "spatial_merge_size", 1))
        if side % step or (own is not None and side > int(own)):
            most = f" of at most {own}" if own is not None else ""
            raise CheckpointError(
                f"{IMAGE_SIDE_KEY}={side} does not fit: {self.name} needs a multiple of {step}{most}"
            )
        return side

    def prompt_format(self, config: Any, *, side: int) -> PromptFormat:
        """What is written around images; words around questions come from the chat template.

        Raises:
            CheckpointError: config.json names an unknown wrapping.
        """
        wrapping = getattr(config, IMAGE_WRAPPING_KEY, "stock")
        if wrapping not in ("stock", "bare"):
            raise CheckpointError(f"{IMAGE_WRAPPING_KEY}: {wrapping!r} is not one of stock, bare")
        stock, tokens = wrapping == "stock", self.tokens(config, side)
        return PromptFormat(
            image_opening=self.opening if stock else "",
            image_closing=self.closing if stock else "",
            image_token=self.image_token,
            tokens_per_image=tokens,
            shared_wrapping=self.shared_wrapping and stock,
            image_side=round(tokens**0.5) if self.square_positions else 0,
        )

    def streams(self, config: Any) -> int:
        """How many vectors of the hidden size a token of an image carries (1; more with DeepStack)."""
        return 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()) or ())


def family_of(path: str | Path, *, wanted: FamilyName | Literal["auto"] = "auto") -> Family:
    """The family of a folder or hub id.

    Args:
        path: where ``from_pretrained`` would read.
        wanted: the family it has to be; "auto" takes any.

    Raises:
        CheckpointError: nothing there, an unknown family, or another than wanted.
    """
    found = _model_type(path)
    if found not in FAMILIES:
        raise CheckpointError(
            f"the model at {path} is of family {found!r}; prefgen knows {', '.join(FAMILY_NAMES)}"
        )
    if wanted not in ("auto", found):
        raise CheckpointError(f"model.family={wanted}, but the model at {path} is of family {found}")
    return FAMILIES[found]


def _model_type(path: str | Path) -> str:
    file = Path(path) / "config.json"
    try:
        if file.is_file():
            return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
        return str(transformers.AutoConfig.from_pretrained(path).model_type)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"no multimodal LLM at {path}: {reason}") from error


def vision_dtype(vision: Any) -> torch.dtype:
    """Number format in which a vision tower takes pixels (quantized weights are whole numbers)."""
    dtypes: list[torch.dtype] = [p.dtype for p in vision.parameters() if p.dtype.is_floating_point]
    return dtypes[0]


def _encode_idefics3(inner: Any, pixels: Tensor) -> Tensor:
    # Not get_image_features: that one drops pictures whose normalised pixels are all zero (plain grey).
    features: Tensor = inner.connector(inner.vision_model(pixel_values=pixels).last_hidden_state)
    return features


def _encode_idefics2(inner: Any, pixels: Tensor) -> Tensor:
    states = inner.vision_model(pixel_values=pixels).last_hidden_state
    whole = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    features: Tensor = inner.connector(states, attention_mask=whole)
    return features


def _encode_llava_onevision(inner: Any, pixels: Tensor) -> Tensor:
    """Each image whole, then one "new line": what the stock model does where a prompt has several images."""
    config = inner.config
    outputs = inner.vision_tower(pixels, output_hidden_states=True)
    layers = config.vision_feature_layer
    chosen = [outputs.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    states = torch.cat(chosen, dim=-1)
    if config.vision_feature_select_strategy == "default":
        states = states[:, 1:]
    features = inner.multi_modal_projector(states)
    line = inner.image_newline.to(features).expand(len(features), 1, -1)
    return torch.cat([features, line], dim=1)


def _patches(vision: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, S, S) as the stock Qwen2-VL image processor flattens them, and the (N, 3) grid sizes.

    Patches that will be merged stand together; a still image fills both frames of a patch in time.
    """
    config = vision.config
    patch, merge, frames = int(config.patch_size), int(config.spatial_merge_size), config.temporal_patch_size
    count, channels, side, _ = pixels.shape
    grid = side // patch
    cut = pixels.view(count, channels, grid // merge, merge, patch, grid // merge, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, block row, block column, row, column, channel, y, x
    cut = cut.unsqueeze(6).expand(*cut.shape[:6], int(frames), patch, patch)
    sizes = torch.tensor([[1, grid, grid]], device=pixels.device).expand(count, -1)
    return cut.reshape(count * grid * grid, -1), sizes


def _encode_qwen(inner: Any, pixels: Tensor) -> Tensor:
    """The merged patches; with DeepStack, what it adds after the first layers stands behind them."""
    patches, sizes = _patches(inner.visual, pixels)
    outputs = inner.visual(patches, grid_thw=sizes)
    streams = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ())]
    return torch.cat(streams, dim=-1).view(len(pixels), -1, len(streams) * streams[0].shape[-1])


def _idefics3_tokens(config: Any, side: int) -> int:
    return int((side // config.vision_config.patch_size) ** 2 / config.scale_factor**2)


def _qwen_tokens(config: Any, side: int) -> int:
    vision = config.vision_config
    return int((side // (int(vision.patch_size) * vision.spatial_merge_size)) ** 2)


def _idefics3_like(name: FamilyName, *, classes: str) -> Family:
    return Family(
        name=name,
        model=f"{classes}ForConditionalGeneration",
        image_processor=f"{name}.image_processing_pil_{name}:{classes}ImageProcessorPil",
        text="text_model",
        vision="vision_model",
        connectors=("connector",),
        encode=_encode_idefics3,
        tokens=_idefics3_tokens,
        opening="<fake_token_around_image><global-img>",
        closing="<fake_token_around_image>",
        squaring="stock",
    )


def _qwen_like(name: FamilyName, *, classes: str) -> Family:
    return Family(
        name=name,
        model=f"{classes}ForConditionalGeneration",
        image_processor="qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
        text="language_model",
        vision="visual",
        connectors=(),
        encode=_encode_qwen,
        tokens=_qwen_tokens,
        image_token="<|image_pad|>",
        opening="<|vision_start|>",
        closing="<|vision_end|>",
        square_positions=True,
        side=224,  # ours: 64 tokens an image at patches of 14, 49 at patches of 16
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="idefics2",
            model="Idefics2ForConditionalGeneration",
            image_processor="idefics2.image_processing_pil_idefics2:Idefics2ImageProcessorPil",
            text="text_model",
            vision="vision_model",
            connectors=("connector",),
            encode=_encode_idefics2,
            tokens=lambda config, _: int(config.perceiver_config.resampler_n_latents),
            opening="<fake_token_around_image>",
            closing="<fake_token_around_image>",
            shared_wrapping=True,
            side=448,  # ours; the earlier system of the paper's first author used 378 to 448
        ),
        _idefics3_like("idefics3", classes="Idefics3"),
        _idefics3_like("smolvlm", classes="SmolVLM"),
        Family(
            name="llava_onevision",
            model="LlavaOnevisionForConditionalGeneration",
            image_processor="llava_onevision.image_processing_pil_llava_onevision:LlavaOnevisionImageProcessorPil",
            text="language_model",
            vision="vision_tower",
            connectors=("multi_modal_projector",),
            encode=_encode_llava_onevision,
            tokens=lambda config, side: int((side // config.vision_config.patch_size) ** 2 + 1),
        ),
        _qwen_like("qwen2_5_vl", classes="Qwen2_5_VL"),
        _qwen_like("qwen3_vl", classes="Qwen3VL"),
    )
}
