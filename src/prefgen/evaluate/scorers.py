"""Published scorers that work where their weights are given: nothing is ever fetched.

Each entry of ``SCORERS`` says what it measures and what has to lie in the folder. The CLIP-shaped ones, DINO
and ViPer are tested with tiny models of the same classes; no real weights have been read here yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from prefgen.errors import ConfigError
from prefgen.evaluate.viper import load_viper

Kind = Literal["prompt", "embedding", "pair", "history"]


class PromptScorer(Protocol):
    """A picture and its prompt -> a number, larger is better."""

    def score(self, images: Sequence[Image.Image], *, prompts: Sequence[str]) -> Tensor:
        """(B,) float32."""


class ImageEmbedder(Protocol):
    """A picture -> an embedding, for likeness with the history."""

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """(B,D) float32."""


class PairScorer(Protocol):
    """Two pictures -> their distance."""

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """(B,) float32 of pixels (B,3,H,W) in [-1,1]."""


class HistoryScorer(Protocol):
    """A picture and what its user liked and disliked -> a number, larger is better."""

    def score(
        self,
        images: Sequence[Image.Image],
        *,
        liked: Sequence[Image.Image],
        disliked: Sequence[Image.Image],
    ) -> Tensor:
        """(B,) float32 of one user's pictures."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One published scorer.

    Attributes:
        kind: which protocol the loaded object follows.
        what: what it measures.
        weights: what the given path must be.
        load: from that path.
        packages: modules that must be installed.
    """

    kind: Kind
    what: str
    weights: str
    load: Callable[[Path], Any]
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClipScorer:
    """CLIP fine-tuned on preferences: ``exp(logit_scale) * cos(image, prompt)`` (PickScore, HPS v2)."""

    model: Any
    tokenizer: Any
    processor: Any

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], *, prompts: Sequence[str]) -> Tensor:
        """(B,) scaled cosine of each picture with its own prompt; a prompt too long is cut, as published."""
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        texts = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        out = self.model(
            input_ids=texts["input_ids"],
            attention_mask=texts["attention_mask"],
            pixel_values=pixels["pixel_values"].to(self.model.dtype),
        )
        cosine = torch.cosine_similarity(out.image_embeds.float(), out.text_embeds.float(), dim=1)
        scaled: Tensor = cosine * self.model.logit_scale.float().exp()
        return scaled


@dataclass(frozen=True, kw_only=True)
class DinoEmbedder:
    """The class token of DINOv2."""

    model: Any
    processor: Any

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """(B,D) class tokens after the last layer norm."""
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        out = self.model(pixel_values=pixels["pixel_values"].to(self.model.dtype))
        tokens: Tensor = out.last_hidden_state[:, 0].float()
        return tokens


@dataclass(frozen=True, kw_only=True)
class LpipsDistance:
    """torchmetrics' LPIPS."""

    network: Any

    @torch.no_grad()
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """(B,) distances of pixels (B,3,H,W) in [-1,1]."""
        rows = [self.network(a[None], b[None]) for a, b in zip(first, second, strict=True)]
        return torch.stack(rows)


@dataclass(frozen=True, kw_only=True)
class RewardScorer:
    """The package ``image-reward``'s model."""

    model: Any

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], *, prompts: Sequence[str]) -> Tensor:
        """(B,) ImageReward."""
        rows = [self.model.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        return torch.tensor(rows, dtype=torch.float32)


def _load_clip(path: Path) -> ClipScorer:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    return ClipScorer(
        model=CLIPModel.from_pretrained(path).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(path),
        processor=CLIPImageProcessorPil.from_pretrained(path),
    )


def _load_dino(path: Path) -> DinoEmbedder:
    from transformers import BitImageProcessorPil, Dinov2Model

    return DinoEmbedder(
        model=Dinov2Model.from_pretrained(path).eval(), processor=BitImageProcessorPil.from_pretrained(path)
    )


def _load_lpips(path: Path) -> LpipsDistance:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    torch.hub.set_dir(str(path))
    return LpipsDistance(network=LearnedPerceptualImagePatchSimilarity(net_type="alex").eval())


def _load_reward(path: Path) -> RewardScorer:
    import ImageReward

    return RewardScorer(
        model=ImageReward.load(str(path / "ImageReward.pt"), med_config=str(path / "med_config.json"))
    )


_CLIP_FOLDER = "a transformers folder of a CLIPModel with its tokenizer and preprocessor"

SCORERS: dict[str, Scorer] = {
    "dino": Scorer(
        kind="embedding",
        what="likeness to the liked images by DINOv2 (arXiv 2304.07193)",
        weights="a transformers folder of a Dinov2Model with its preprocessor",
        load=_load_dino,
    ),
    "lpips": Scorer(
        kind="pair",
        what="perceptual distance between a user's pictures (arXiv 1801.03924)",
        weights="a torch.hub folder with checkpoints/ of torchvision's AlexNet in it",
        load=_load_lpips,
        packages=("torchvision",),
    ),
    "pickscore": Scorer(
        kind="prompt",
        what="PickScore (arXiv 2305.01569)",
        weights=_CLIP_FOLDER,
        load=_load_clip,
    ),
    "hpsv2": Scorer(
        kind="prompt",
        what="HPS v2 (arXiv 2306.09341)",
        weights=_CLIP_FOLDER,
        load=_load_clip,
    ),
    "imagereward": Scorer(
        kind="prompt",
        what="ImageReward (arXiv 2304.05977)",
        weights="a folder with ImageReward.pt and med_config.json",
        load=_load_reward,
        packages=("ImageReward",),
    ),
    "viper": Scorer(
        kind="history",
        what="ViPer's proxy (arXiv 2407.17365): how much the user would like a picture, by the history",
        weights="the published adapter (adapter_model.safetensors) with its Idefics2 in base/",
        load=load_viper,
    ),
}
"""Name -> scorer."""


def find_scorer(name: str, *, weights: Path) -> Scorer:
    """The entry of a name, checked for weights and packages, before anything is loaded.

    Raises:
        ConfigError: no such scorer, no weights there, or a package is missing.
    """
    if name not in SCORERS:
        raise ConfigError(f"unknown scorer {name!r}; scorers: {', '.join(sorted(SCORERS))}")
    scorer = SCORERS[name]
    if not weights.is_dir():
        raise ConfigError(f"no weights of {name} at {weights}; give {scorer.weights}, nothing is downloaded")
    missing = [package for package in scorer.packages if find_spec(package) is None]
    if missing:
        raise ConfigError(f"scorer {name} needs the package {missing[0]}, which is not installed")
    return scorer


def load_scorer(name: str, *, weights: Path) -> Any:
    """A ready scorer; see ``SCORERS[name].kind`` for what it can do.

    Raises:
        ConfigError: as :func:`find_scorer`, or the weights are of another kind.
    """
    scorer = find_scorer(name, weights=weights)
    try:
        return scorer.load(weights)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"cannot load {name} from {weights}: expected {scorer.weights} ({reason})"
        ) from None
