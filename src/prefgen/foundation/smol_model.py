"""SmolLM2 behind the mini MLLM's eyes: one multimodal LLM of the Idefics3 classes, and what joins the two.

The only new weights are a matrix from the mini MLLM's one token an image, from which subject and attributes
of a drawing can be read linearly, to the language model's words. It is folded into the connector, so that the
finished folder holds nothing but the stock classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from prefgen.errors import DataError
from prefgen.foundation.captioned import CaptionedImages
from prefgen.foundation.gguf_text import GGUFText, add_image_tokens
from prefgen.models.families import IMAGE_WRAPPING_KEY
from prefgen.models.mllm import MLLM

IMAGE_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
"""What the stock processor of Idefics3 looks for; prompts of this model use the first alone."""

RIDGE = 1e-3
"""Ridge penalty, as a share of the features' mean square."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The parts while they grow together.

    Attributes:
        mllm: the whole model; its connector is written by :meth:`fold`.
        bridge: from an image's token of the mini MLLM, at mean length 1, to a token of the language model.
        sight: (D, patches x width) the mini MLLM's connector, scaled so that its tokens have mean length 1.
        features: (N, 1, D) such tokens, of the pictures to learn from.
    """

    mllm: MLLM
    bridge: nn.Linear
    sight: Tensor
    features: Tensor

    @torch.no_grad()
    def fold(self) -> None:
        """Write both matrices into the connector as one: exact, since there is nothing between them."""
        connector = self.mllm.model.model.connector.modality_projection.proj
        connector.weight.copy_(self.bridge.weight @ self.sight)


def join(text: GGUFText, *, eyes: MLLM) -> MLLM:
    """Language model and vision tower as one Idefics3 model; its connector is random still.

    Args:
        text: the language model; its weights are copied.
        eyes: a model of the Idefics3 classes, whose vision tower, image size and tokens an image are taken.

    Raises:
        DataError: ``eyes`` is of another family, or shows an image as several tokens.
    """
    tokens = eyes.encoder.format.tokens_per_image
    if eyes.family.name != "idefics3" or tokens != 1:
        raise DataError(
            "the vision tower has to be of family idefics3 with one token an image, "
            f"got {eyes.family.name} with {tokens}"
        )
    tokenizer = add_image_tokens(text.tokenizer, named=IMAGE_TOKENS)
    words = text.model.model.embed_tokens.weight.detach()
    added = len(tokenizer) - len(words)
    text_config = copy.deepcopy(text.model.config)
    text_config.vocab_size = len(tokenizer)
    config = Idefics3Config(
        text_config=text_config,
        vision_config=copy.deepcopy(eyes.model.config.vision_config),
        scale_factor=eyes.model.config.scale_factor,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        attn_implementation="eager",
        **{IMAGE_WRAPPING_KEY: "bare"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Idefics3ForConditionalGeneration(config).float()
    # a new word starts as the mean of all words: its logit is then their mean, which no greedy answer picks
    table = torch.cat([words, words.mean(dim=0, keepdim=True).expand(added, -1)])
    inner = model.model
    inner.text_model.load_state_dict({**text.model.model.state_dict(), "embed_tokens.weight": table})
    inner.vision_model.load_state_dict(eyes.model.model.vision_model.state_dict())
    model.tie_weights()
    model.requires_grad_(False)
    return MLLM.assemble(model.eval(), tokenizer=tokenizer, image_processor=eyes.image_processor)


def start_bridge(mllm: MLLM, data: CaptionedImages, *, features: Tensor) -> Tensor:
    """Ridge regression from features to the mean embedding of the words that name what a picture shows.

    So an image begins as a token among words, of a word's mean length: the language model knows nothing else.

    Args:
        mllm: whose word embeddings are meant.
        data: N pictures.
        features: (N, D).

    Returns:
        (Dtext, D).
    """
    table = mllm.text_model.embed_tokens.weight.detach().double()
    known: dict[str, Tensor] = {}

    def vector(phrase: str) -> Tensor:
        if phrase not in known:
            known[phrase] = table[mllm.encoder.text_ids(f" {phrase}")].mean(dim=0)
        return known[phrase]

    named = [(prompt, *words) for prompt, words in zip(data.prompts, data.attributes, strict=True)]
    targets = torch.stack([torch.stack([vector(phrase) for phrase in each]).mean(dim=0) for each in named])
    inputs = features.double()
    products = inputs.T @ inputs
    penalty = RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)
    weight = torch.linalg.solve(products + penalty, inputs.T @ targets).T
    length = (inputs @ weight.T).norm(dim=-1).mean()
    scaled: Tensor = weight * (table.norm(dim=-1).mean() / length)
    return scaled.float()


def grow_together(text: GGUFText, *, eyes: MLLM, data: CaptionedImages, features: Tensor) -> Joined:
    """Join the parts and start the bridge.

    Args:
        text: the language model.
        eyes: the model whose tower is taken.
        data: N pictures.
        features: (N, 1, D) of ``eyes``.
    """
    mllm = join(text, eyes=eyes)
    length = float(features.norm(dim=-1).mean())
    features = features / length
    weight = start_bridge(mllm, data, features=features.flatten(1))
    bridge = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        bridge.weight.copy_(weight)
    sight = eyes.model.model.connector.modality_projection.proj.weight.detach().float() / length
    joined = Joined(mllm=mllm, bridge=bridge, sight=sight, features=features)
    joined.fold()
    return joined
