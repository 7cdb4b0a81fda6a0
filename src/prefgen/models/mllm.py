"""A multi-image multimodal LLM, worked from cached image features.

Images go through the vision tower and connector once (:meth:`MLLM.encode_images`); everything afterwards puts
those features into the slots of packed token rows (:mod:`prefgen.models.packing`) and runs the language model
alone. The same code serves pretraining, the vqa and probe stages, profile building and ``explain``, and all
families of :mod:`prefgen.models.families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, DynamicCache, Idefics3Processor

from prefgen.errors import CheckpointError, DataError
from prefgen.models.deepstack import DeepStack
from prefgen.models.families import FAMILIES, Family, FamilyName, family_of, vision_dtype
from prefgen.models.layer_hooks import OnLayer, watch_layers
from prefgen.models.loading import quiet_loading
from prefgen.models.mllm_pixels import PixelMaker
from prefgen.models.packing import PackedBatch, PackItem, pack_batch
from prefgen.models.prefix_cache import PrefixPlan, run_with_prefix_cache
from prefgen.models.prompts import PromptEncoder, chat_format
from prefgen.models.quantization import Quantization, keep_trainable, quantization_config

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"]
Sharing = Literal["mask", "cache"]
"""How the questions of one history share it: by an additive mask, or by cached keys and values."""


@dataclass
class MLLM:
    """Model, tokenizer, image processor and prompt format of one multimodal LLM.

    Attributes:
        model: the ``...ForConditionalGeneration`` of its family.
        tokenizer: with its chat template, if any.
        image_processor: of the family, on PIL.
        encoder: prompts to ids.
        family: what differs from other families.
        image_size: side in pixels of the square the vision tower sees.
        sharing: how packed questions share their history; flash attention knows "cache" only.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    encoder: PromptEncoder = field(repr=False)
    family: Family = field(repr=False)
    image_size: int
    sharing: Sharing = "mask"

    @staticmethod
    def load(
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: Attention = "sdpa",
        family: FamilyName | Literal["auto"] = "auto",
        quantization: Quantization = "none",
    ) -> MLLM:
        """Load a folder (or hub id) through ``from_pretrained``.

        Args:
            path: folder or hub id.
            dtype: of the weights.
            device: where they go.
            attention: attention code of transformers; the flash ones need their package and a GPU.
            family: the family it has to be of; "auto" takes any that prefgen knows.
            quantization: "nf4" holds the language model's linear layers in 4 bits (QLoRA).

        Raises:
            CheckpointError: nothing loadable there, another family, an image side that does not fit, or the
                package that quantization needs is absent.
        """
        kind = family_of(path, wanted=family)
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        if quantization != "none":
            skipped = [f"model.{part}" for part in (kind.vision, *kind.connectors)] + ["lm_head"]
            options["quantization_config"] = quantization_config(quantization, dtype=dtype, skipped=skipped)
        try:
            with quiet_loading():
                config = AutoConfig.from_pretrained(path)
                processor = kind.load_image_processor(path, side=kind.side_of(config))
                model = kind.model_class().from_pretrained(path, **options)
                tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"no multimodal LLM of family {kind.name} at {path}: {reason}") from error
        model = model.to(device).eval()
        if quantization != "none":
            keep_trainable(model)
        return MLLM.assemble(
            model,
            tokenizer=tokenizer,
            image_processor=processor,
            sharing="cache" if attention.startswith("flash") else "mask",
        )

    @staticmethod
    def assemble(
        model: Any,
        *,
        tokenizer: Any,
        image_processor: Any,
        sharing: Sharing = "mask",
    ) -> MLLM:
        """From parts already in memory; the prompt format follows the tokenizer's chat template."""
        family = FAMILIES[model.config.model_type]
        side = family.side_of(model.config)
        form = chat_format(tokenizer, images=family.prompt_format(model.config, side=side))
        return MLLM(
            model=model,
            tokenizer=tokenizer,
            image_processor=image_processor,
            encoder=PromptEncoder(tokenizer=tokenizer, format=form),
            family=family,
            image_size=side,
            sharing=sharing,
        )

    def save(self, path: str | Path) -> None:
        """Write model, tokenizer, chat template and image processor where ``from_pretrained`` finds them."""
        with quiet_loading():
            self.model.save_pretrained(path)
        if self.family.name == "idefics3":
            self.processor().save_pretrained(path)
        else:  # not all stock processors can be built without torchvision
            self.tokenizer.save_pretrained(path)
            self.image_processor.save_pretrained(path)

    def processor(self) -> Any:
        """The stock processor of Idefics3 with these parts."""
        return Idefics3Processor(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            image_seq_len=self.encoder.format.tokens_per_image,
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
        return getattr(self.model.model, self.family.text)

    @property
    def text_config(self) -> Any:
        """Its configuration."""
        return self.model.config.text_config

    @property
    def hidden_size(self) -> int:
        """D of hidden states."""
        return int(self.text_config.hidden_size)

    @property
    def feature_size(self) -> int:
        """Width of image features: D, or several times D where a family feeds images to several layers."""
        return self.hidden_size * self.family.streams(self.model.config)

    @property
    def num_layers(self) -> int:
        """Decoder layers; hidden state 0 is the input embedding, l the output of layer l."""
        return int(self.text_config.num_hidden_layers)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row the language model was built for."""
        return int(self.text_config.max_position_embeddings)

    @property
    def pixels(self) -> PixelMaker:
        """Makes (N, 3, H, W) normalised pixels of pictures."""
        return PixelMaker(processor=self.image_processor, side=self.image_size, squaring=self.family.squaring)

    def checkpoint_layers(self) -> None:
        """Trade time for memory: forget what is inside each decoder layer and compute it again backwards.

        Raises:
            CheckpointError: questions share cached keys and values, which a second computation would extend.
        """
        if self.sharing == "cache":
            raise CheckpointError(
                "model.gradient_checkpointing=true does not go with flash attention, whose packed questions "
                "share cached keys and values; use model.attention=sdpa"
            )
        self.text_model.activation_checkpointing_enable()
        # transformers checkpoints layers in training mode only; it has no dropout to switch on otherwise
        self.text_model.train()

    # Images

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Vision tower and connector with gradients: (N, 3, H, W) -> (N, tokens_per_image, feature_size)."""
        inner = self.model.model
        dtype = vision_dtype(getattr(inner, self.family.vision))
        return self.family.encode(inner, pixels.to(device=self.device, dtype=dtype))

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image] | np.ndarray | Tensor, *, batch_size: int = 128
    ) -> Tensor:
        """Features to cache: PIL images, uint8 (N, H, W, 3), or normalised (N, 3, H, W) -> (N, K, F)."""
        parts = [
            self.encode_pixels(part if isinstance(part, Tensor) else self.pixels(part))
            for part in (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        ]
        shape = (0, self.encoder.format.tokens_per_image, self.feature_size)
        return torch.cat(parts) if parts else torch.zeros(shape, device=self.device)

    # Prompts

    def embed(self, batch: PackedBatch, *, image_features: Tensor) -> Tensor:
        """Token embeddings (B, T, D) with image features in their slots; features are (N, K, F)."""
        embeds: Tensor = self.text_model.get_input_embeddings()(batch.input_ids)
        if batch.image_rows.numel() == 0:
            return embeds
        size = embeds.shape[-1]
        chosen = image_features[batch.image_rows.to(image_features.device)][..., :size].to(embeds)
        flat = embeds.reshape(-1, size)
        flat = flat.index_copy(0, batch.image_slots.reshape(-1), chosen.reshape(-1, size))
        return flat.view_as(embeds)

    def hidden(
        self,
        batch: PackedBatch,
        *,
        image_features: Tensor,
        layers: Sequence[int] = (),
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D), after the final norm.

        Args:
            batch: packed prompts.
            image_features: (N, K, F).
            layers: numbers (1 to L) of layers to show.
            on_layer: called with the number and the output (B, T, D) of each, while the pass runs.
        """
        embeds = self.embed(batch, image_features=image_features)
        deep = DeepStack.of(batch, image_features=image_features, like=embeds)
        plan = PrefixPlan.of(batch) if self.sharing == "cache" else None
        with watch_layers(self.text_model.layers, layers=layers, on_layer=on_layer, plan=plan):
            if plan is not None:
                return self._hidden_by_cache(batch, plan=plan, embeds=embeds, deep=deep)
            device = embeds.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype
            output = self.text_model(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask(dtype=dtype),
                position_ids=batch.position_ids,
                use_cache=False,
                **deep.arguments(shape=batch.input_ids.shape),
            )
        last: Tensor = output.last_hidden_state
        return last

    def _hidden_by_cache(
        self, batch: PackedBatch, *, plan: PrefixPlan, embeds: Tensor, deep: DeepStack
    ) -> Tensor:
        flat, places = embeds.reshape(-1, embeds.shape[-1]), batch.position_ids.flatten(-2)

        def run(tokens: Tensor, *, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
            output = self.text_model(
                inputs_embeds=flat[tokens],
                attention_mask=attention_mask.long(),
                position_ids=places[..., tokens],
                past_key_values=cache,
                use_cache=True,
                **deep.arguments(tokens),
            )
            states: Tensor = output.last_hidden_state
            return states

        return run_with_prefix_cache(plan, run=run, text_config=self.text_config)

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
        cache = DynamicCache(config=self.text_config)
        embeds = self.embed(batch, image_features=image_features)
        deep = DeepStack.of(batch, image_features=image_features, like=embeds)
        more = deep.arguments(shape=batch.input_ids.shape)
        places, following = batch.position_ids, int(batch.position_ids.max()) + 1
        stop, ids = self.encoder.stop_id, []
        for _ in range(max_new_tokens):
            output = self.text_model(
                inputs_embeds=embeds, position_ids=places, past_key_values=cache, use_cache=True, **more
            )
            chosen = self.model.lm_head(output.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
            token = int(chosen)
            if token == stop or token == self.tokenizer.eos_token_id:
                break
            ids.append(token)
            embeds, more = self.text_model.get_input_embeddings()(chosen), {}
            places, following = torch.full_like(places[..., :1], following), following + 1
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
