"""LoRA on a frozen MLLM, trained on the answers to questions about a user."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from prefgen.lineage import hash_folder
from prefgen.models.lora import add_lora, save_lora
from prefgen.models.packing import PackedBatch, PackItem
from prefgen.models.questions import (
    FIRST_SECOND,
    PLUS_MINUS,
    YES_NO,
    QuestionKind,
    UserRows,
    history_pieces,
    list_question,
    parse_attributes,
)
from prefgen.models.scoring import LikeScores, like_accuracy
from prefgen.schema import Split
from prefgen.stages.base import StageModule
from prefgen.stages.features import SplitFeatures, load_mllm, model_hash
from prefgen.stages.sharding import gathered
from prefgen.stages.vqa.config import VQAConfig
from prefgen.stages.vqa.data import VQABatch, VQAData
from prefgen.stages.vqa.report import like_report, write_like_report

ARTEFACT = "lora"
ListKind = Literal["likes", "dislikes"]
LISTS: tuple[ListKind, ...] = get_args(ListKind)
CHOICES: dict[QuestionKind, tuple[str, str]] = {
    "like": YES_NO,
    "choose": FIRST_SECOND,
    "score": PLUS_MINUS,
}


class VQAModule(StageModule):
    """Stage vqa."""

    stage: ClassVar[str] = "vqa"

    def __init__(self, config: VQAConfig) -> None:
        super().__init__(config)
        self.config = config
        model = config.model
        self.mllm = load_mllm(model)
        # LoRA's start depends on the seed alone, not on what drew random numbers before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.lora = add_lora(
                self.mllm,
                rank=model.lora_rank,
                alpha=model.lora_alpha,
                dropout=model.lora_dropout,
                targets=model.lora_targets,
            )
        if model.gradient_checkpointing:
            self.mllm.checkpoint_layers()

    def forward(self, batch: PackedBatch, *, image_features: Tensor) -> Tensor:
        """Last hidden states (B, T, D)."""
        return self.mllm.hidden(batch, image_features=image_features)

    # Steps

    def training_step(self, batch: VQABatch) -> Tensor:
        """Cross-entropy of answer tokens."""
        hidden = self(batch.packed, image_features=self._features(batch, split="train"))
        losses = self.mllm.token_losses(batch.packed, hidden=hidden)
        per_question = self._question_losses(losses, batch=batch.packed)
        weighed = losses if self.config.questions.loss == "token" else per_question
        loss = weighed.mean()
        if weight := self.config.questions.contrastive_weight:
            contrast = self._contrast(batch, hidden=hidden)
            self.log("train/loss_contrast", contrast.detach(), batch_size=len(batch.user_ids))
            loss = loss + weight * contrast
        self.log("train/loss", loss.detach(), batch_size=len(batch.user_ids), prog_bar=True)
        for kind, rows in _rows_by_kind(batch).items():
            self.log(f"train/loss_{kind}", per_question[rows].detach().mean(), batch_size=len(rows))
        return loss * self.mean_share(len(weighed))  # ranks differ in questions

    def validation_step(self, batch: VQABatch) -> None:
        """Accuracy and loss per question kind on unseen users."""
        self._measure(batch, split="validation", prefix="val")

    def test_step(self, batch: VQABatch) -> None:
        """The same on test users."""
        self._measure(batch, split="test", prefix="test")

    def on_validation_epoch_end(self) -> None:
        """Let the model list what some users like and dislike, and check the lists."""
        with gathered(self):
            self._check_lists("validation", prefix="val")

    def on_test_epoch_end(self) -> None:
        """The same on test users; accuracy by number of references; is the probability of Yes true?"""
        with gathered(self):
            self._check_lists("test", prefix="test")
            self._study_likes()

    def _measure(self, batch: VQABatch, *, split: Split, prefix: str) -> None:
        hidden = self(batch.packed, image_features=self._features(batch, split=split))
        losses = self._question_losses(
            self.mllm.token_losses(batch.packed, hidden=hidden), batch=batch.packed
        )
        rows = _rows_by_kind(batch)
        for kind, own in rows.items():
            self.log(f"{prefix}/loss_{kind}", losses[own].mean(), batch_size=len(own), sync_dist=True)
        for kind, words in CHOICES.items():
            if kind not in rows:
                continue
            logits = self.mllm.choice_logits(batch.packed, hidden=hidden, answers=words)[rows[kind]]
            right = (logits.argmax(-1) == batch.correct[rows[kind]]).float()
            self.log(f"{prefix}/accuracy_{kind}", right.mean(), batch_size=len(right), sync_dist=True)

    def _question_losses(self, losses: Tensor, *, batch: PackedBatch) -> Tensor:
        """(Q,) mean over a question's answer tokens, its first one weighted (it holds the decision)."""
        owners = batch.target_questions
        weights = torch.ones_like(losses)
        first = torch.ones_like(owners, dtype=torch.bool)
        first[1:] = owners[1:] != owners[:-1]
        weights[first] = self.config.questions.first_token_weight
        zeros = losses.new_zeros(batch.num_questions)
        total = zeros.index_add(0, owners, losses * weights)
        return total / zeros.index_add(0, owners, weights).clamp(min=1e-6)

    def _contrast(self, batch: VQABatch, *, hidden: Tensor) -> Tensor:
        """-log sigmoid(margin of a liked image - margin of a disliked one) over all pairs of one history.

        The margin is the logit of Yes less that of No. Zero for a batch without such a pair.
        """
        rows = _rows_by_kind(batch).get("like", [])
        logits = self.mllm.choice_logits(batch.packed, hidden=hidden, answers=YES_NO)[rows]
        margins, owners = logits[:, 0] - logits[:, 1], batch.packed.question_items[rows]
        liked = batch.correct[rows] == 0
        pairs = (owners[:, None] == owners[None]) & liked[:, None] & ~liked[None]
        losses = nn.functional.softplus(margins[None] - margins[:, None])
        return (losses * pairs).sum() / pairs.sum().clamp(min=1)

    def _features(self, batch: VQABatch, *, split: Split) -> Tensor:
        if batch.pixels is not None:
            return self.mllm.encode_images(batch.pixels)
        return self._data.split(split).features

    @property
    def _data(self) -> VQAData:
        data = self.trainer.datamodule
        assert isinstance(data, VQAData)
        return data

    # Lists

    @torch.no_grad()
    def _check_lists(self, split: Split, *, prefix: str) -> None:
        """Precision and recall of the generated lists, the accuracy of the two open question kinds."""
        data = self._data.split(split)
        if not len(data.features):
            return
        count = self.config.questions.num_listed_users
        scores: dict[str, list[float]] = defaultdict(list)
        for kind in LISTS:
            truths = [(user, _true_list(user, kind=kind)) for user in data.users]
            for user, truth in [pair for pair in truths if pair[1]][:count]:
                said = self._list(user, kind=kind, features=data.features)
                right = truth & set(said)
                scores[f"{kind}_precision"].append(len(right) / max(1, len(said)))
                scores[f"{kind}_recall"].append(len(right) / len(truth))
        for name, values in scores.items():
            mean = sum(values) / len(values)
            self.log(f"{prefix}/{name}", mean, sync_dist=True, batch_size=len(values))

    def _list(self, user: UserRows, *, kind: ListKind, features: Tensor) -> tuple[str, ...]:
        most = self.config.data.eval_references
        liked = range(min(most, len(user.history.liked)))
        disliked = range(min(most, len(user.history.disliked)))
        pieces = history_pieces(
            user.rows("liked", positions=liked), disliked=user.rows("disliked", positions=disliked)
        )
        item = PackItem(history=pieces, questions=[list_question(kind)])
        return parse_attributes(self.mllm.generate(item, image_features=features, max_new_tokens=64))

    # Like or dislike in depth

    @torch.no_grad()
    def _study_likes(self) -> None:
        """Write the report of :mod:`prefgen.stages.vqa.report`.

        Nothing without cached features, nor for a single user: nobody else's history could be shown instead.
        """
        test, validation = self._data.split("test"), self._data.split("validation")
        if not len(test.features) or len(test.users) < 2 or not self.trainer.is_global_zero:
            return
        data, seed = self.config.data, self.config.seed
        most = max(max(len(u.history.liked), len(u.history.disliked)) for u in test.users) - 1
        counts = sorted({count for count in data.reference_counts if count <= most} | {data.eval_references})

        def ask(split: SplitFeatures, count: int, *, swap: bool = False) -> LikeScores:
            return like_accuracy(
                self.mllm,
                users=split.users,
                image_features=split.features,
                num_references=(count, count),
                num_queries=data.eval_queries,
                swap_histories=swap,
                seed=seed,
                batch_size=data.batch_size,
            )

        report = like_report(
            {count: ask(test, count) for count in counts},
            swapped=ask(test, data.eval_references, swap=True),
            validation=ask(validation, data.eval_references),
            users=test.users,
            num_references=data.eval_references,
            num_queries=data.eval_queries,
            seed=seed,
            lora=hash_folder(lora) if (lora := self.run_dir / ARTEFACT).is_dir() else "",
        )
        for name, picture in write_like_report(report, folder=self.run_dir).items():
            for board in self.trainer.loggers:
                experiment = getattr(board, "experiment", None)
                if hasattr(experiment, "add_image"):
                    experiment.add_image(  # type: ignore[union-attr]
                        f"test/{name}", picture, self.trainer.global_step, dataformats="HWC"
                    )
        for name, value in report.figures().items():
            self.log(f"test/{name}", value, rank_zero_only=True)

    # Artefact

    def export(self, run_dir: Path) -> Path:
        """Write ``lora/`` in peft's format, with the hash of the model it belongs to beside it."""
        mllm_hash = model_hash(self.config.model.mllm)
        return save_lora(self.lora, path=run_dir / ARTEFACT, mllm_hash=mllm_hash)


def _true_list(user: UserRows, *, kind: ListKind) -> set[str]:
    history = user.history
    return set(history.liked_attributes if kind == "likes" else history.disliked_attributes)


def _rows_by_kind(batch: VQABatch) -> dict[QuestionKind, list[int]]:
    rows: dict[QuestionKind, list[int]] = {}
    for kind in get_args(QuestionKind):
        if own := [i for i, name in enumerate(batch.kinds) if name == kind]:
            rows[kind] = own
    return rows
