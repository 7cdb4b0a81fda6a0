"""Like-or-dislike questions on unseen users and subjects: the MLLM, the oracle, and the control."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefgen.evaluate.alignment import Estimate, bootstrap
from prefgen.evaluate.oracle import oracle_scores
from prefgen.evaluate.preference import share_of
from prefgen.models.lora import load_lora
from prefgen.models.mllm import MLLM, Attention
from prefgen.models.quantization import Quantization
from prefgen.models.questions import UserRows
from prefgen.models.scoring import LikeScores, draw_like, like_accuracy
from prefgen.stages.features import load_features, model_hash, model_source
from prefgen.study.config import EvaluateModelConfig


@dataclass(frozen=True, kw_only=True)
class MLLMForm:
    """In which form an evaluation holds a multimodal LLM; the words are those of :meth:`MLLM.load`."""

    dtype: torch.dtype
    device: str
    attention: Attention
    quantization: Quantization

    def load(self, path: Path | str) -> MLLM:
        """Read one.

        Raises:
            CheckpointError: see :meth:`MLLM.load`.
        """
        return MLLM.load(
            path,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            quantization=self.quantization,
        )


def mllm_form(model: EvaluateModelConfig) -> MLLMForm:
    """That of the evaluated MLLM: half precision on a GPU, where 8 B would not fit otherwise."""
    half = model.precision == "bfloat16" and model.device != "cpu"
    return MLLMForm(
        dtype=torch.bfloat16 if half else torch.float32,
        device=model.device,
        attention=model.attention,
        quantization=model.quantization,
    )


def ask(
    *,
    mllm: str,
    lora: Path,
    shards: Path,
    feature_cache: Path | None,
    groups: Mapping[str, Sequence[str]],
    num_references: int,
    num_questions: int,
    max_users: int,
    in_bf16: bool,
    form: MLLMForm,
    seed: int,
    num_resamples: int,
) -> dict[str, Any]:
    """``vqa_accuracy``, ``vqa_before_lora``, ``history_blind`` and, with true attributes, the oracle's.

    Raises:
        CheckpointError: the MLLM or its LoRA cannot be read.
        DataError: no test users.
    """
    model_id = model_hash(mllm)
    model = form.load(model_source(mllm))
    data = load_features(
        model,
        shards=shards,
        split="test",
        mllm_hash=model_id,
        cache=feature_cache,
        in_bf16=in_bf16,
        device=form.device,
    )
    users = [user for user in data.users if user.num_images > 1][: max_users or None]

    def score(*, swapped: bool = False) -> LikeScores:
        precision = torch.autocast(model.device.type, dtype=torch.bfloat16)
        with precision if in_bf16 else contextlib.nullcontext():
            return like_accuracy(
                model,
                users=users,
                image_features=data.features.float(),
                num_references=(num_references, num_references),
                num_queries=num_questions,
                swap_histories=swapped,
                seed=seed,
            )

    def estimate(scores: LikeScores) -> Estimate:
        return bootstrap(scores.per_user(), seed=seed, draws=num_resamples)

    before = score()
    load_lora(model, path=lora, mllm_hash=model_id)
    after, blind = score(), score(swapped=True)
    figures: dict[str, Any] = {
        "vqa_accuracy": asdict(estimate(after)),
        "vqa_before_lora": asdict(estimate(before)),
        "history_blind": asdict(estimate(blind)),
        "num_questions": len(after.liked),
    }
    if not _attributes_known(users):
        return figures
    ceiling = ask_oracle(
        users,
        scores=after,
        groups=groups,
        num_references=num_references,
        num_questions=num_questions,
        seed=seed,
    )
    ratio = share_of(after.per_user(), ceiling.per_user(), seed=seed, num_resamples=num_resamples)
    return {**figures, "oracle": asdict(estimate(ceiling)), "vqa_of_oracle": asdict(ratio)}


def ask_oracle(
    users: Sequence[UserRows],
    *,
    scores: LikeScores,
    groups: Mapping[str, Sequence[str]],
    num_references: int,
    num_questions: int,
    seed: int,
) -> LikeScores:
    """The oracle's answers to the very questions of ``scores``: same references, same images."""
    odds: list[float] = []
    for user in users:
        history = user.history
        drawn = draw_like(
            history, num_references=(num_references, num_references), num_queries=num_questions, seed=seed
        )
        asked = [(history.liked if liked else history.disliked)[i].attributes for liked, i in drawn.queries]
        odds += oracle_scores(
            [history.liked[i].attributes for i in drawn.liked],
            disliked=[history.disliked[i].attributes for i in drawn.disliked],
            queries=asked,
            groups=groups,
        )
    probability = 1 / (1 + np.exp(-np.array(odds)))
    return replace(scores, probability=probability)


def _attributes_known(users: Sequence[UserRows]) -> bool:
    return all(image.attributes for user in users for image in (*user.history.liked, *user.history.disliked))
