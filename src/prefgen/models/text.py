"""The frozen text encoder of a diffusers pipeline folder, read for ONE vector a text.

Stage align needs the text space and nothing else of the pipeline, so only ``tokenizer`` and ``text_encoder``
are loaded: for SDXL that leaves ten gigabytes unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from prefgen.errors import DataError

TextPooling = Literal["pooled", "mean_tokens"]
TextEncoderName = Literal["text_encoder", "text_encoder_2"]

_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True, kw_only=True)
class TextSpace:
    """A tokenizer and its frozen encoder.

    Attributes:
        tokenizer: the pipeline's own.
        encoder: ``CLIPTextModel`` (its pooled state) or ``CLIPTextModelWithProjection`` (its projection).
        pooling: which vector stands for a text.
        max_tokens: how many tokens the encoder takes, start and end included.
    """

    tokenizer: Any
    encoder: torch.nn.Module
    pooling: TextPooling
    max_tokens: int

    @staticmethod
    def load(
        path: Path,
        *,
        part: TextEncoderName = "text_encoder",
        pooling: TextPooling = "pooled",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> TextSpace:
        """Read the text side of a pipeline folder.

        Args:
            path: a folder in diffusers format (``model_index.json`` inside).
            part: which of the pipeline's encoders; SDXL's pooled text comes from ``text_encoder_2``.
            pooling: the encoder's own pooled vector, or the mean over the text's tokens.
            dtype: of the frozen weights.
            device: where to encode.

        Raises:
            DataError: no pipeline there, no such encoder, or a class without a pooled vector.
        """
        kind = _encoder_class(path, part=part)
        # transformers takes seconds to import; whoever only asks for this module's types should not wait.
        import transformers

        tokenizer = transformers.CLIPTokenizer.from_pretrained(
            path / part.replace("text_encoder", "tokenizer")
        )
        encoder = getattr(transformers, kind).from_pretrained(path / part, dtype=dtype).to(device)
        encoder.requires_grad_(False).eval()
        limit = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
        return TextSpace(tokenizer=tokenizer, encoder=encoder, pooling=pooling, max_tokens=limit)

    @staticmethod
    def width(path: Path, *, part: TextEncoderName = "text_encoder", pooling: TextPooling = "pooled") -> int:
        """Dtext of a pipeline folder, from its configuration alone; arguments and errors as for ``load``."""
        kind = _encoder_class(path, part=part)
        config = json.loads((path / part / "config.json").read_text(encoding="utf-8"))
        projected = kind == "CLIPTextModelWithProjection" and pooling == "pooled"
        return int(config["projection_dim" if projected else "hidden_size"])

    def num_tokens(self, text: str) -> int:
        """Tokens of a text, start and end included."""
        return len(self.tokenizer(text)["input_ids"])

    def draw_list(self, words: Sequence[str], *, rng: np.random.Generator) -> str:
        """The words in a newly drawn order as one comma list, as many of them as fit the encoder.

        Raises:
            DataError: not even one of the words fits.
        """
        return draw_list(words, rng=rng, num_tokens=self.num_tokens, max_tokens=self.max_tokens)

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, batch_size: int = 128, progress: Callable[[int], object] | None = None
    ) -> Tensor:
        """(N,Dtext) float32 on the CPU, one vector per text, each text as it stands.

        Args:
            texts: N texts; equal ones are encoded once.
            batch_size: texts per forward pass.
            progress: called with the number of texts just done.

        Raises:
            DataError: a text is longer than the encoder takes; nothing is ever cut.
        """
        # Sorted by length: padding to the longest of a mixed batch would cost more than the texts themselves.
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        rows: list[Tensor] = []
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            rows.append(self._encode_batch(batch))
            if progress is not None:
                progress(len(batch))
        place = {text: row for row, text in enumerate(distinct)}
        return torch.cat(rows)[[place[text] for text in texts]]

    def _encode_batch(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(texts, padding="longest", return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if length > self.max_tokens:
            longest = max(texts, key=self.num_tokens)
            raise DataError(
                f"text of {length} tokens for an encoder of {self.max_tokens}, "
                f"never cut silently: {longest[:60]!r}"
            )
        device = next(self.encoder.parameters()).device
        outputs = self.encoder(**{name: value.to(device) for name, value in inputs.items()})
        if self.pooling == "pooled":
            pooled = outputs.text_embeds if hasattr(outputs, "text_embeds") else outputs.pooler_output
            return cast(Tensor, pooled).float().cpu()
        mask = inputs["attention_mask"].to(device).unsqueeze(-1)
        hidden = cast(Tensor, outputs.last_hidden_state).float()
        mean: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean.cpu()


def _encoder_class(path: Path, *, part: TextEncoderName) -> str:
    index = path / "model_index.json"
    if not index.is_file():
        raise DataError(
            f"no diffusers pipeline at {path}: model_index.json is missing; pass model.pipeline=FOLDER"
        )
    entry = json.loads(index.read_text(encoding="utf-8")).get(part) or [None, None]
    if entry[1] not in _CLASSES:
        raise DataError(f"{path}: {part} is {entry[1]}, expected one of {', '.join(_CLASSES)}")
    return str(entry[1])


def draw_list(
    words: Sequence[str],
    *,
    rng: np.random.Generator,
    num_tokens: Callable[[str], int],
    max_tokens: int,
) -> str:
    """Join words in a drawn order until the next one would not fit; a too long word is passed over.

    CLIP's encoders hold 77 tokens and some 50 attributes take about 133, so a fixed order would show the
    encoder the same first half for ever. Drawn anew, each word has its turn.

    Raises:
        DataError: no words, or none that fits by itself.
    """
    order = [words[int(index)] for index in rng.permutation(len(words))]
    if order and num_tokens(", ".join(order)) <= max_tokens:
        return ", ".join(order)
    chosen: list[str] = []
    for word in order:
        longer = [*chosen, word]
        if num_tokens(", ".join(longer)) <= max_tokens:
            chosen = longer
    if not chosen:
        raise DataError(f"no attribute out of {len(words)} fits the text encoder's {max_tokens} tokens")
    return ", ".join(chosen)
