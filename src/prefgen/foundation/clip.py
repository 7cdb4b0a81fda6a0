"""A small CLIP: an image tower that learned to see first, then a text tower trained to meet it.

The image tower is locked while the symmetric contrastive loss trains the text tower and both projections
(locked-image tuning, arXiv 2111.07991): its pictures are encoded once, so a batch costs captions only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from prefgen.foundation.captioned import CaptionedImages
from prefgen.foundation.loop import Loop, LoopPlan, quick
from prefgen.foundation.tower import encode_all, train_tower
from prefgen.foundation.vae import pixels
from prefgen.models.clip_tokenizer import train_clip_tokenizer

TOWER_PLAN = LoopPlan(batch_size=128, steps=2400, learning_rate=7e-4, warmup=150, weight_decay=0.05)
PLAN = LoopPlan(batch_size=384, steps=2000, learning_rate=1e-3, warmup=150, weight_decay=0.05, ema=0.998)
MAX_TOKENS = 32
REPORTED = 256
SUBJECT_RATE = 0.35
VOCABULARY = 1024
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def build_clip(*, vocab_size: int, eos_token_id: int, image_size: int) -> CLIPModel:
    """About 2.5 M parameters of the stock classes: patches of 8 pixels, width 160, projection 128."""
    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        bos_token_id=eos_token_id - 1,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        projection_dim=128,
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )


def train_clip(
    data: CaptionedImages,
    heldout: CaptionedImages,
    *,
    work: Path,
    out: Path,
    plans: tuple[LoopPlan, LoopPlan] = (TOWER_PLAN, PLAN),
) -> dict[str, object]:
    """Train, then save the two towers where a diffusers pipeline looks for them.

    Args:
        data: pictures to learn from.
        heldout: unseen pictures for the report: R@1 of a picture's caption among 256, and of its subject.
        work: checkpoints.
        out: receives ``clip_projection.safetensors``, ``tokenizer``, ``text_encoder``, ``image_encoder``
            and ``feature_extractor``.
        plans: length and rate of the image tower on phrases, then of the text tower on captions.

    Returns:
        Figures for the card.
    """
    torch.manual_seed(plans[0].seed)
    corpus = data.corpus(count=20_000, seed=plans[0].seed)
    tokenizer = train_clip_tokenizer(corpus, vocab_size=VOCABULARY, max_length=MAX_TOKENS)
    clip = build_clip(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, image_size=data.images.shape[1]
    )

    def encode(images: npt.NDArray[np.uint8]) -> Tensor:
        pooled: Tensor = clip.vision_model(pixel_values=pixels(images)).pooler_output
        return pooled

    tower = train_tower(
        clip.vision_model,
        data,
        heldout,
        encode=encode,
        width=clip.config.vision_config.hidden_size,
        work=work / "tower",
        plan=plans[0],
        title="clip tower",
    )
    clip.vision_model.requires_grad_(False).eval()
    features = encode_all(data.images, encode=encode, title="drawings")
    unseen = encode_all(heldout.images[:REPORTED], encode=encode, title="unseen drawings")
    loop = Loop(clip, plan=plans[1], folder=work / "text")

    def compare(shown: Tensor, texts: list[str]) -> Tensor:
        """Logits of every picture against every text."""
        ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        with quick(), sdpa_kernel(SDPBackend.MATH):
            text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
            image = clip.visual_projection(shown)
        text = nn.functional.normalize(text.float(), dim=-1)
        image = nn.functional.normalize(image.float(), dim=-1)
        logits: Tensor = clip.logit_scale.exp().clamp_max(100) * image @ text.T
        return logits

    def loss(_: int, rng: np.random.Generator, __: torch.Generator) -> dict[str, Tensor]:
        rows = rng.integers(len(data), size=plans[1].batch_size)
        captions = [data.caption(int(i), rng=rng, subject_rate=SUBJECT_RATE) for i in rows]
        logits = compare(features[torch.from_numpy(rows)], captions)
        return {"loss": contrastive_loss(logits, captions=captions)}

    def report() -> dict[str, float]:
        subjects = heldout.prompts[: len(unseen)]
        texts = [", ".join((p, *a)) for p, a in zip(subjects, heldout.attributes, strict=False)]
        own = compare(unseen, texts).argmax(dim=1) == torch.arange(len(unseen))
        names = sorted(set(heldout.prompts))
        named = compare(unseen, names).argmax(dim=1).tolist()
        right = [names[index] == subject for index, subject in zip(named, subjects, strict=True)]
        return {"retrieval": float(own.float().mean()), "subject_accuracy": float(np.mean(right))}

    history = loop.run(loss, report=report, title="clip")
    loop.use_average()
    clip.eval()
    with torch.no_grad():
        final = report()
    save_towers(clip, tokenizer=tokenizer, out=out, image_size=data.images.shape[1])
    return {
        "gate": "none; report of caption retrieval among 256 unseen drawings, and of naming their subject",
        **final,
        "num_subjects": len(set(heldout.prompts)),
        "parameters": sum(p.numel() for p in clip.parameters()),
        "history": {"tower": tower, "text": history},
    }


def contrastive_loss(logits: Tensor, *, captions: list[str]) -> Tensor:
    """Symmetric cross-entropy in which pictures with one caption are all right answers to each other.

    Args:
        logits: (B, B), pictures by texts.
        captions: B texts; equal ones (subjects alone) are common.
    """
    place = {caption: i for i, caption in enumerate(captions)}
    kind = torch.tensor([place[caption] for caption in captions])
    same = (kind[:, None] == kind[None, :]).float()
    wanted = same / same.sum(dim=1, keepdim=True)
    # `same` is symmetric, so one matrix serves both directions.
    both = nn.functional.cross_entropy(logits, wanted) + nn.functional.cross_entropy(logits.T, wanted)
    return both / 2


def save_towers(clip: CLIPModel, *, tokenizer: Any, out: Path, image_size: int) -> None:
    """Write the two towers as a diffusers pipeline wants them, in fp16.

    The rest of the CLIP (how text meets images) is two small tensors in ``clip_projection.safetensors``;
    ``prefgen.models.clip.load_clip`` puts the whole together again, so no weight is stored twice.
    """
    state = {name: value.half() for name, value in clip.state_dict().items()}
    text = CLIPTextModel(clip.config.text_config)
    image = CLIPVisionModelWithProjection(clip.config.vision_config)
    for tower, prefix in ((text, "text_model."), (image, "vision_model.")):
        # Text models hold the tower's weights with or without its prefix, by version of transformers.
        bare = not any(name.startswith(prefix) for name in tower.state_dict())
        own = {(n.removeprefix(prefix) if bare else n): v for n, v in state.items() if n.startswith(prefix)}
        if prefix == "vision_model.":
            own["visual_projection.weight"] = state["visual_projection.weight"]
        tower.half().load_state_dict(own)
    text.save_pretrained(out / "text_encoder")
    image.save_pretrained(out / "image_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    join = {name: state[name].clone() for name in ("text_projection.weight", "logit_scale")}
    save_file(join, out / "clip_projection.safetensors", metadata={"format": "pt"})
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    processor.save_pretrained(out / "feature_extractor")
