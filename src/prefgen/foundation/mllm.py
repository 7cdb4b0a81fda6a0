"""The multi-image MLLM: its tower learns to see, then all of it to speak, then to compare sets of pictures.

The order matters (measured in the spikes): with the tower still training, or several tokens an image, the
in-context comparison never leaves chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prefgen.foundation.captioned import CaptionedImages
from prefgen.foundation.episodes import (
    WORDINGS,
    Difficulty,
    Episode,
    PictureIndex,
    caption_item,
    draw_episode,
)
from prefgen.foundation.loop import Loop, LoopPlan
from prefgen.foundation.tower import encode_all, train_tower
from prefgen.models.mllm import MLLM
from prefgen.models.mllm_build import MLLMSpec, build_mllm, train_tokenizer
from prefgen.models.packing import PackItem, pack_batch
from prefgen.models.questions import (
    CHOOSE_WORDS,
    DISLIKED_MARK,
    DISLIKES_WORDS,
    FIRST_SECOND,
    LIKE_WORDS,
    LIKED_MARK,
    LIKES_WORDS,
)

SPEC = MLLMSpec(
    vision_hidden=128,
    vision_layers=4,
    vision_heads=4,
    text_hidden=192,
    text_layers=8,
    text_heads=3,
    text_intermediate=512,
    max_positions=512,
)
TOWER_PLAN = LoopPlan(batch_size=128, steps=3600, learning_rate=7e-4, warmup=150, weight_decay=0.05)
CAPTION_PLAN = LoopPlan(batch_size=64, steps=800, learning_rate=6e-4, warmup=100, weight_decay=0.05)
GROUPING_PLAN = LoopPlan(batch_size=32, steps=4000, learning_rate=8e-4, warmup=200, weight_decay=0.05)
CAPTIONS_KEPT = 8
STAGES: tuple[tuple[float, Difficulty], ...] = (
    (0.15, Difficulty(min_groups=1, max_groups=2, num_values=1)),
    (0.4, Difficulty(min_groups=1, max_groups=3, num_values=2)),
    (1.01, Difficulty(min_groups=2, max_groups=4, num_values=2)),
)
"""Difficulty until this share of the steps."""


def build(data: CaptionedImages, *, seed: int) -> MLLM:
    """Fresh weights, and a tokenizer that has met every caption and the words later stages use."""
    questions = [CHOOSE_WORDS[0], CHOOSE_WORDS[1], CHOOSE_WORDS[2], LIKE_WORDS, LIKES_WORDS, DISLIKES_WORDS]
    answers = ["Yes, because of the", "No, because of the", *FIRST_SECOND]
    words = [*questions, LIKED_MARK, DISLIKED_MARK, *answers]
    words += [part for wording in WORDINGS for part in (*wording[:3], *wording[3])]
    corpus = [*data.corpus(count=20_000, seed=seed), *(words * 50)]
    tokenizer = train_tokenizer(corpus, vocab_size=1024)
    side = data.images.shape[1]
    # as many patches merged as there are: ONE token an image
    spec = replace(SPEC, image_size=side, scale_factor=side // SPEC.patch_size)
    return build_mllm(tokenizer, spec=spec, seed=seed)


def train_captions(
    mllm: MLLM, data: CaptionedImages, heldout: CaptionedImages, *, work: Path, plan: LoopPlan
) -> list[dict[str, float]]:
    """Tower, connector and language model learn to say what a picture shows."""
    loop = Loop(mllm.model, plan=plan, folder=work)

    def losses(source: CaptionedImages, rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        items = [caption_item(source, int(row), feature=i, rng=rng) for i, row in enumerate(rows)]
        batch = pack_batch(mllm.encoder, items=items)
        with torch.autocast("cpu", torch.bfloat16):
            features = mllm.encode_pixels(mllm.pixels(np.array(source.images[rows])))
            return mllm.answer_loss(batch, image_features=features)

    def loss(_: int, rng: np.random.Generator, __: torch.Generator) -> dict[str, Tensor]:
        rows = np.sort(rng.integers(len(data), size=plan.batch_size))
        return {"loss": losses(data, rows, rng)}

    def report() -> dict[str, float]:
        count = min(256, len(heldout))
        value = losses(heldout, np.arange(count), np.random.default_rng(0))
        return {"heldout_loss": float(value), "naming": naming_accuracy(mllm, heldout, count=count)}

    return loop.run(loss, report=report, title="mllm captions")


def naming_accuracy(mllm: MLLM, data: CaptionedImages, *, count: int) -> float:
    """Share of attribute questions whose whole answer is the likeliest token by token."""
    rng = np.random.default_rng(1)
    items = [caption_item(data, row, feature=row, rng=rng) for row in range(count)]
    items = [replace(item, questions=item.questions[2:]) for item in items]
    batch = pack_batch(mllm.encoder, items=items)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = mllm.encode_images(np.array(data.images[:count]))
        hidden = mllm.hidden(batch, image_features=features)
        right = mllm.logits_at(hidden, batch.predictors).argmax(dim=-1) == batch.targets
    wrong = torch.zeros(batch.num_questions).index_add_(0, batch.target_questions, (~right).float())
    return float((wrong == 0).float().mean())


def train_grouping(
    mllm: MLLM, data: CaptionedImages, heldout: CaptionedImages, *, work: Path, plan: LoopPlan
) -> list[dict[str, float]]:
    """The language model learns to compare sets; some captions stay, so that words keep their meaning."""
    inner = mllm.model.model
    for part in (inner.vision_model, inner.connector):
        part.requires_grad_(False)
    features = encode_all(data.images, encode=mllm.encode_images, title="drawings")
    unseen = encode_all(heldout.images, encode=mllm.encode_images, title="unseen drawings")
    index, unseen_index = PictureIndex(data), PictureIndex(heldout)
    loop = Loop(mllm.model, plan=plan, folder=work)
    exam_rng = np.random.default_rng(7)
    exam = [
        draw_episode(unseen_index, difficulty=replace(STAGES[-1][1], min_images=8), rng=exam_rng)
        for _ in range(128)
    ]

    def loss(step: int, rng: np.random.Generator, _: torch.Generator) -> dict[str, Tensor]:
        difficulty = next(d for share, d in STAGES if step < share * plan.steps)
        episodes = [draw_episode(index, difficulty=difficulty, rng=rng) for _ in range(plan.batch_size)]
        rows = rng.integers(len(data), size=CAPTIONS_KEPT)
        items = [episode.item for episode in episodes]
        items += [caption_item(data, int(row), feature=int(row), rng=rng) for row in rows]
        batch = pack_batch(mllm.encoder, items=items)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = mllm.hidden(batch, image_features=features)
            each = mllm.token_losses(batch, hidden=hidden)
        query = _query_tokens(batch.target_questions, episodes)
        grouping = each[query].mean()
        return {"loss": 2 * grouping + each[~query].mean(), "grouping": grouping}

    def report() -> dict[str, float]:
        return {"grouping_accuracy": grouping_accuracy(mllm, exam, features=unseen)}

    return loop.run(loss, report=report, title="mllm grouping")


def _query_tokens(target_questions: Tensor, episodes: Sequence[Episode]) -> Tensor:
    """Which answer tokens answer a grouping query (the rest are lists and captions)."""
    is_query: list[bool] = []
    for episode in episodes:
        lists = len(episode.item.questions) - len(episode.correct)
        is_query += [True] * len(episode.correct) + [False] * lists
    flags = torch.zeros(int(target_questions.max()) + 1, dtype=torch.bool)
    flags[: len(is_query)] = torch.tensor(is_query)
    return flags[target_questions]


def grouping_accuracy(mllm: MLLM, episodes: Sequence[Episode], *, features: Tensor) -> float:
    """Share of queries whose right answer's first token is likelier than the other's."""
    right = 0
    total = 0
    for wording in WORDINGS:
        own = [episode for episode in episodes if episode.answers == wording[3]]
        for start in range(0, len(own), 32):
            part = own[start : start + 32]
            items = [_without_answers(episode) for episode in part]
            batch = pack_batch(mllm.encoder, items=items)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                hidden = mllm.hidden(batch, image_features=features)
                chosen = mllm.choice_logits(batch, hidden=hidden, answers=wording[3]).argmax(dim=-1)
            correct = torch.tensor([side for episode in part for side in episode.correct])
            right += int((chosen == correct).sum())
            total += len(correct)
    return right / max(1, total)


def _without_answers(episode: Episode) -> PackItem:
    queries = episode.item.questions[: len(episode.correct)]
    return replace(episode.item, questions=[replace(query, answer=None) for query in queries])


def train_mllm(
    data: CaptionedImages,
    heldout: CaptionedImages,
    *,
    work: Path,
    out: Path,
    plans: tuple[LoopPlan, LoopPlan, LoopPlan] = (TOWER_PLAN, CAPTION_PLAN, GROUPING_PLAN),
) -> dict[str, object]:
    """Three curricula on seen subjects only, then save to ``out`` in fp16; returns the card's figures.

    The gate is measured on unseen drawings of UNSEEN subjects; the tokenizer alone has met every word.
    """
    mllm = build(data, seed=plans[0].seed)
    data, heldout = data.subset(unseen=False), heldout.subset(unseen=True)
    inner = mllm.model.model
    tower = train_tower(
        nn.ModuleList([inner.vision_model, inner.connector]),
        data,
        heldout,
        encode=lambda images: mllm.encode_pixels(mllm.pixels(images)).flatten(1),
        width=mllm.hidden_size,
        work=work / "tower",
        plan=plans[0],
        title="mllm tower",
    )
    captions = train_captions(mllm, data, heldout, work=work / "captions", plan=plans[1])
    grouping = train_grouping(mllm, data, heldout, work=work / "grouping", plan=plans[2])
    mllm.model.half()
    mllm.save(out)
    return {
        "gate": "neutral grouping of unseen drawings of unseen subjects at least .90 with 8 + 8 pictures",
        "pictures": len(data),
        "naming": captions[-1]["naming"],
        "grouping_accuracy": grouping[-1]["grouping_accuracy"],
        "parameters": sum(p.numel() for p in mllm.model.parameters()),
        "history": {"tower": tower, "captions": captions, "grouping": grouping},
    }
