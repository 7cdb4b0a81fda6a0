"""ViPer's proxy metric (arXiv 2407.17365): Idefics2 with a published LoRA, told likes and dislikes in turn.

The prompt is that of the published code (github.com/EPFL-VILAB/ViPer, ``metric.py``): pairs of a disliked and
a liked image, each asked "Score for this image?" and answered with - or +, then the picture in question; the
score is the softmax of the two answers' logits. So are the image sides (378 to 448 pixels) and that as many
disliked as liked images are shown, about eight each. Never run with its real weights here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

ADAPTER = "adapter_model.safetensors"
BASE = "base"
"""Folder inside the adapter's that holds the Idefics2 it belongs to (published for idefics2-8b)."""

MAX_PAIRS = 8
"""Pairs of a disliked and a liked image in the prompt: what the authors recommend."""

SHORTEST, LONGEST = 378, 448

_ASK = "User:<image>Score for this image?<end_of_utterance>\nAssistant: "
_TOLD = _ASK + "{}<end_of_utterance>\n"


@dataclass(frozen=True, kw_only=True)
class ViperProxy:
    """The proxy, ready to be asked.

    Attributes:
        model: Idefics2 with the LoRA.
        processor: Idefics2's own.
    """

    model: Any
    processor: Any

    @torch.no_grad()
    def score(
        self,
        images: Sequence[Image.Image],
        *,
        liked: Sequence[Image.Image],
        disliked: Sequence[Image.Image],
    ) -> Tensor:
        """(B,) float32 in [0,1]: how much one user would like each picture.

        Args:
            images: B pictures, each asked about by itself.
            liked: images the user likes, at least one.
            disliked: images the user dislikes, at least one. The longer side and what is beyond
                ``MAX_PAIRS`` are cut: the prompt holds pairs.

        Raises:
            ValueError: one side is empty; there is no such prompt.
        """
        pairs = list(zip(disliked, liked, strict=False))[:MAX_PAIRS]
        if not pairs:
            raise ValueError("the prompt of ViPer's proxy needs a liked and a disliked image")
        told = [image.convert("RGB") for pair in pairs for image in pair]
        prompt = (_TOLD.format("-") + _TOLD.format("+")) * len(pairs) + _ASK
        answers = [self._answer_id("+"), self._answer_id("-")]
        scores = []
        for image in images:
            inputs = self.processor(text=prompt, images=[*told, image.convert("RGB")], return_tensors="pt")
            logits = self.model(**inputs).logits[0, -1, answers].float()
            scores.append(logits.softmax(dim=0)[0])
        return torch.stack(scores)

    def _answer_id(self, sign: str) -> int:
        """The token that an answer is in the prompt; the published code writes down Mistral's numbers."""
        ids = self.processor.tokenizer.encode(f"Assistant: {sign}", add_special_tokens=False)
        return int(ids[-1])


def load_viper(path: Path) -> ViperProxy:
    """From a folder with the published adapter and, in ``base/``, its Idefics2.

    Raises:
        ValueError: files are missing (peft would fall back on pickles), or the adapter is another model's.
        OSError: nothing that transformers can load.
    """
    from transformers import AutoTokenizer, Idefics2ForConditionalGeneration, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    for name in (ADAPTER, "adapter_config.json", f"{BASE}/config.json"):
        if not (path / name).is_file():
            raise ValueError(f"no {name}")
    model = Idefics2ForConditionalGeneration.from_pretrained(path / BASE)
    found = model.load_adapter(str(path))
    if found.missing_keys or found.unexpected_keys:
        raise ValueError("the adapter does not fit the model in base/")
    most = int(model.config.vision_config.image_size)  # 980 in the published model; smaller ones in tests
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil.from_pretrained(
            path / BASE,
            size={"shortest_edge": min(SHORTEST, most), "longest_edge": min(LONGEST, most)},
            do_image_splitting=False,
        ),
        tokenizer=AutoTokenizer.from_pretrained(path / BASE),
        image_seq_len=int(model.config.perceiver_config.resampler_n_latents),
    )
    return ViperProxy(model=model.eval(), processor=processor)
