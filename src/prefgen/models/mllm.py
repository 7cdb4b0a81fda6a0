"""A multi-image multimodal LLM of the Idefics3 classes, worked from cached image features.

Images go through the vision tower and connector once (:meth:`MLLM.encode_images`); everything afterwards puts
those features into the slots of packed token rows (:mod:`prefgen.models.packing`) and runs the language model
alone. The same code serves pretraining, the vqa and probe stages, profile building and ``explain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from prefgen.errors import CheckpointError, DataError
from prefgen.models.loading import quiet_loading
from prefgen.models.packing import PackedBatch, PackItem, PromptEncoder, PromptFormat, pack_batch

IMAGE_WRAPPING_KEY = "prefgen_image_wrapping"
"""Key in config.json: "stock" writes <fake><global-img> around an image, "bare" writes nothing."""


@dataclass
class MLLM:
    """Model, tokenizer, image processor and prompt format of one multimodal LLM."""

    model: Any
    tokenizer: Any
    image_processor: Any
    encoder: PromptEncoder = field(repr=False)

    @staticmethod
    def load(
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str = "sdpa",
    ) -> MLLM:
        """Load a folder (or hub id) through ``from_pretrained``.

        Raises:
            CheckpointError: nothing loadable there.
        """
        try:
            with quiet_loading():
                model = Idefics3ForConditionalGeneration.from_pretrained(
                    path, dtype=dtype, attn_implementation=attention
                )
                tokenizer = AutoTokenizer.from_pretrained(path)
                processor = Idefics3ImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"no multimodal LLM of the Idefics3 classes at {path}: {reason}") from error
        model = model.to(device).eval()
        return MLLM.assemble(model, tokenizer=tokenizer, image_processor=processor)

    @staticmethod
    def assemble(model: Any, *, tokenizer: Any, image_processor: Any) -> MLLM:
        """From parts already in memory; the prompt format follows the tokenizer's chat template."""
        wrapping = getattr(model.config, IMAGE_WRAPPING_KEY, "stock")
        form = chat_format(tokenizer, tokens_per_image=model.model.image_seq_len, image_wrapping=wrapping)
        encoder = PromptEncoder(tokenizer=tokenizer, format=form)
        return MLLM(model=model, tokenizer=tokenizer, image_processor=image_processor, encoder=encoder)

    def save(self, path: str | Path) -> None:
        """Write model, tokenizer, chat template and processor where ``from_pretrained`` finds them."""
        with quiet_loading():
            self.model.save_pretrained(path)
        self.processor().save_pretrained(path)

    def processor(self) -> Any:
        """The stock processor with these parts."""
        return Idefics3Processor(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            image_seq_len=self.model.model.image_seq_len,
            chat_template=self.tokenizer.chat_template,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.lm_head.weight.device
        return device

    @property
    def text_model(self) -> Any:
        """The language model (LoRA goes here)."""
        return self.model.model.text_model

    @property
    def hidden_size(self) -> int:
        """D of hidden states and image features."""
        return int(self.model.config.text_config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers; hidden state 0 is the input embedding, l the output of layer l."""
        return int(self.model.config.text_config.num_hidden_layers)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row the language model was built for."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square the vision tower sees."""
        return int(self.model.config.vision_config.image_size)

    def pixels(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """(N, 3, H, W) normalised pixels; see :func:`make_pixels`."""
        return make_pixels(images, processor=self.image_processor, side=self.image_size)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Vision tower and connector with gradients: (N, 3, H, W) -> (N, tokens_per_image, D).

        Not ``get_image_features``: that one drops pictures whose normalised pixels are all zero (plain grey).
        """
        inner = self.model.model
        pixels = pixels.to(
            device=self.device, dtype=inner.vision_model.embeddings.patch_embedding.weight.dtype
        )
        features: Tensor = inner.connector(inner.vision_model(pixel_values=pixels).last_hidden_state)
        return features

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image] | np.ndarray | Tensor, *, batch_size: int = 128
    ) -> Tensor:
        """Features to cache: PIL images, uint8 (N, H, W, 3), or normalised (N, 3, H, W) -> (N, K, D)."""
        parts = [
            self.encode_pixels(part if isinstance(part, Tensor) else self.pixels(part))
            for part in (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        ]
        shape = (0, self.encoder.format.tokens_per_image, self.hidden_size)
        return torch.cat(parts) if parts else torch.zeros(shape, device=self.device)

    def embed(self, batch: PackedBatch, *, image_features: Tensor) -> Tensor:
        """Token embeddings (B, T, D) with image features in their slots; features are (N, K, D)."""
        embeds: Tensor = self.text_model.get_input_embeddings()(batch.input_ids)
        if batch.image_rows.numel() == 0:
            return embeds
        size = embeds.shape[-1]
        chosen = image_features[batch.image_rows.to(image_features.device)].to(embeds)
        flat = embeds.reshape(-1, size)
        flat = flat.index_copy(0, batch.image_slots.reshape(-1), chosen.reshape(-1, size))
        return flat.view_as(embeds)

    def hidden(self, batch: PackedBatch, *, image_features: Tensor) -> Tensor:
        """Last hidden states (B, T, D), after the final norm."""
        embeds = self.embed(batch, image_features=image_features)
        device = embeds.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype
        output = self.text_model(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask(dtype=dtype),
            position_ids=batch.position_ids,
            use_cache=False,
        )
        last: Tensor = output.last_hidden_state
        return last

    def logits_at(self, hidden: Tensor, flat: Tensor) -> Tensor:
        """Logits (n, V) at flat positions only: the vocabulary is never spread over all tokens."""
        logits: Tensor = self.model.lm_head(hidden.reshape(-1, hidden.shape[-1])[flat])
        return logits

    def token_losses(self, batch: PackedBatch, *, hidden: Tensor) -> Tensor:
        """Cross-entropy (n,) of every answer token, float32; nothing else is trained on."""
        logits = self.logits_at(hidden, batch.predictors)
        return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")

    def answer_loss(self, batch: PackedBatch, *, image_features: Tensor) -> Tensor:
        """Mean cross-entropy over answer tokens (a scalar): what pretraining and stage 1 minimise."""
        hidden = self.hidden(batch, image_features=image_features)
        return self.token_losses(batch, hidden=hidden).mean()

    def choice_logits(self, batch: PackedBatch, *, hidden: Tensor, answers: Sequence[str]) -> Tensor:
        """(Q, len(answers)) logits of the first token of each possible answer, at the reading points."""
        ids = torch.tensor(self.encoder.first_ids(answers), device=hidden.device)
        return self.logits_at(hidden, batch.reading_points)[:, ids].float()

    @torch.no_grad()
    def generate(self, item: PackItem, *, image_features: Tensor, max_new_tokens: int = 48) -> str:
        """Greedy answer to the one question of ``item``, with cached keys and values.

        Raises:
            DataError: the item does not hold exactly one question without an answer.
        """
        if len(item.questions) != 1 or item.questions[0].answer is not None:
            raise DataError(f"generate answers one open question, got {len(item.questions)}")
        batch = pack_batch(self.encoder, items=[item]).to(self.device)
        cache = DynamicCache(config=self.model.config.text_config)
        embeds = self.embed(batch, image_features=image_features)
        stop, ids = self.encoder.stop_id, []
        for _ in range(max_new_tokens):
            output = self.text_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            chosen = self.model.lm_head(output.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
            token = int(chosen)
            if token == stop or token == self.tokenizer.eos_token_id:
                break
            ids.append(token)
            embeds = self.text_model.get_input_embeddings()(chosen)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def make_pixels(images: Sequence[Image.Image] | np.ndarray, *, processor: Any, side: int) -> Tensor:
    """(N, 3, side, side) pixels as the stock image processor makes them.

    Pictures that have the right size already, and uint8 arrays (N, side, side, 3), skip its slow resizing.

    Raises:
        DataError: an array of another type or shape.
    """
    if not isinstance(images, np.ndarray):
        if any(image.size != (side, side) for image in images):
            nested = [[image.convert("RGB")] for image in images]
            pixels: Tensor = processor(nested, return_tensors="pt")["pixel_values"]
            return pixels[:, 0]
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
        raise DataError(
            f"pixels: expected uint8 (N, {side}, {side}, 3), got {images.dtype} {tuple(images.shape)}"
        )
    raw = torch.from_numpy(images).permute(0, 3, 1, 2).float() * processor.rescale_factor
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    normalised: Tensor = (raw - mean) / std
    return normalised


def chat_format(tokenizer: Any, *, tokens_per_image: int, image_wrapping: str = "stock") -> PromptFormat:
    """Read what a chat template writes around question and answer, by rendering it with two marks.

    Raises:
        CheckpointError: the template loses or repeats a mark, or the wrapping is unknown.
    """
    if image_wrapping not in ("stock", "bare"):
        raise CheckpointError(f"{IMAGE_WRAPPING_KEY}: {image_wrapping!r} is not one of stock, bare")
    stock = image_wrapping == "stock"
    wrapping = {
        "image_opening": "<fake_token_around_image><global-img>" if stock else "",
        "image_closing": "<fake_token_around_image>" if stock else "",
        "image_token": "<image>",
    }
    if tokenizer.chat_template is None:
        return PromptFormat(answer_lead=" ", tokens_per_image=tokens_per_image, **wrapping)
    asked, answered = "QUESTIONMARK", "ANSWERMARK"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": asked}]},
        {"role": "assistant", "content": [{"type": "text", "text": answered}]},
    ]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if text.count(asked) != 1 or text.count(answered) != 1:
        raise CheckpointError("the chat template does not write question and answer exactly once")
    opening, rest = text.split(asked)
    before, after = rest.split(answered)
    # "Assistant: " + "Yes" is tokenized as "Assistant:" + " Yes": the space belongs to the answer.
    lead = before[len(before.rstrip(" ")) :]
    return PromptFormat(
        opening=opening,
        before_answer=before.rstrip(" "),
        answer_lead=lead,
        after_answer=after.rstrip(),
        tokens_per_image=tokens_per_image,
        **wrapping,
    )
