"""Several questions behind one shared history, as one row of tokens.

A row is ``history | question 1 + answer 1 | question 2 + answer 2 | ...``. Each question sees the history and
itself only, and starts at the same position (the length of the history), so the logits are those of asking
them one by one while the history is attended once. The mask is ADDITIVE FLOAT: in the eager attention
of transformers a boolean 4D mask is added as 0/1 and is silently wrong.

Words are free: the vqa stage, the neutral grouping of the foundation and plain captions all pack here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from prefgen.errors import DataError
from prefgen.models.prompts import Piece, PromptEncoder, positions


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question; ``answer`` None means: read or generate at its end."""

    pieces: Sequence[Piece]
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class PackItem:
    """A history and the questions that share it. Either may be without images; questions may be empty."""

    history: Sequence[Piece] = ()
    questions: Sequence[Question] = ()


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """B packed rows of T tokens holding Q questions, n answer tokens and I images. Flat = row * T + column.

    Attributes:
        input_ids: (B, T) token ids, placeholders where images stand.
        segments: (B, T) 0 in the history, 1.. in the questions, -1 in the padding.
        position_ids: (B, T) position within "history + own question"; (3, B, T) time, height and width where
            the family's positions have two dimensions.
        image_rows: (I,) row of ``image_features`` of each image.
        image_slots: (I, tokens_per_image) flat positions of its placeholders.
        predictors: (n,) flat positions whose hidden state predicts an answer token.
        targets: (n,) the answer tokens.
        target_questions: (n,) which of the Q questions each answer token belongs to.
        reading_points: (Q,) flat position of the last token before each answer.
        question_items: (Q,) row of each question.
        question_segments: (Q,) segment number of each question in its row.
    """

    input_ids: Tensor
    segments: Tensor
    position_ids: Tensor
    image_rows: Tensor
    image_slots: Tensor
    predictors: Tensor
    targets: Tensor
    target_questions: Tensor
    reading_points: Tensor
    question_items: Tensor
    question_segments: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """All tensors on another device (the signature Lightning calls)."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return replace(self, **moved)

    @property
    def num_questions(self) -> int:
        """Q."""
        return self.reading_points.shape[0]

    def attention_mask(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, 1, T, T) additive: 0 where a token may look, the most negative number elsewhere.

        Padding looks at padding, so that no row is empty (an empty row gives NaN under autocast).
        """
        length = self.segments.shape[1]
        keys, queries = self.segments[:, None, :], self.segments[:, :, None]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        visible = ((keys == 0) | (keys == queries)) & causal
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def labels(self) -> Tensor:
        """(B, T) next-token labels at the position that predicts them, -100 elsewhere."""
        labels = torch.full((self.input_ids.numel(),), -100, dtype=torch.long, device=self.input_ids.device)
        labels[self.predictors] = self.targets
        return labels.view_as(self.input_ids)


def pack_batch(
    encoder: PromptEncoder, *, items: Sequence[PackItem], max_length: int | None = None
) -> PackedBatch:
    """Pack each item into one row, padded to the longest.

    Args:
        encoder: tokenizer and format.
        items: histories with their questions; an ``int`` piece is a row of the features given to the model.
        max_length: the longest row allowed.

    Raises:
        DataError: no items, a row longer than ``max_length``, or an answer with nothing before it.
    """
    if not items:
        raise DataError("nothing to pack: got 0 items")
    rows = [_Row(encoder, item) for item in items]
    length = max(1, max(len(row.ids) for row in rows))
    if max_length is not None and length > max_length:
        raise DataError(
            f"a packed row has {length} tokens, allowed are {max_length}: use fewer references or questions"
        )
    pad = encoder.tokenizer.pad_token_id or 0
    starts = np.arange(len(rows)) * length
    width = np.arange(encoder.format.tokens_per_image)
    offsets = _flat([row.image_offsets for row in rows], starts=starts)
    return PackedBatch(
        input_ids=_grid([row.ids for row in rows], length=length, fill=pad),
        segments=_grid([row.segments for row in rows], length=length, fill=-1),
        position_ids=_positions(rows, length=length),
        image_rows=_long([value for row in rows for value in row.image_rows]),
        image_slots=torch.from_numpy(offsets[:, None] + width[None, :]),
        predictors=torch.from_numpy(_flat([row.predictors for row in rows], starts=starts)),
        targets=_long([value for row in rows for value in row.targets]),
        target_questions=_target_questions(rows),
        reading_points=torch.from_numpy(_flat([row.reading_points for row in rows], starts=starts)),
        question_items=_long([i for i, row in enumerate(rows) for _ in row.reading_points]),
        question_segments=_long([k + 1 for row in rows for k in range(len(row.reading_points))]),
    )


def row_length(encoder: PromptEncoder, *, item: PackItem) -> int:
    """Tokens of an item's packed row, before padding."""
    return len(_Row(encoder, item).ids)


class _Row:
    """One packed row as plain lists; loops run over pieces, never over tokens."""

    def __init__(self, encoder: PromptEncoder, item: PackItem) -> None:
        form = encoder.format
        self.ids, self.image_offsets, self.image_rows = encoder.segment([form.opening, *item.history])
        history = len(self.ids)
        placed, after_history = positions(form, length=history, images=self.image_offsets, start=0)
        parts = [placed]
        self.segments = [0] * history
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.answer_lengths: list[int] = []
        self.reading_points: list[int] = []
        after_image = bool(item.history) and isinstance(item.history[-1], int)
        for number, question in enumerate(item.questions, start=1):
            start = len(self.ids)
            ids, offsets, rows = encoder.segment(
                [*question.pieces, form.before_answer], after_image=after_image
            )
            if start + len(ids) == 0:
                raise DataError("a question needs a token before its answer: give it words or an image")
            self.image_offsets += [start + offset for offset in offsets]
            self.image_rows += rows
            # With no token of its own the question is read at the end of the history.
            reading_point = start + len(ids) - 1 if ids else history - 1
            self.reading_points.append(reading_point)
            answer: list[int] = []
            if question.answer is not None:
                answer = encoder.text_ids(form.answer_lead + question.answer + form.after_answer)
                first = start + len(ids)
                self.predictors += [reading_point, *range(first, first + len(answer) - 1)][: len(answer)]
                self.targets += answer
            self.answer_lengths.append(len(answer))
            self.ids = self.ids + ids + answer
            added = len(ids) + len(answer)
            self.segments += [number] * added
            placed, _ = positions(form, length=added, images=offsets, start=after_history)
            parts.append(placed)
        self.positions = np.concatenate(parts, axis=1)


def _grid(rows: Sequence[Sequence[int] | np.ndarray], *, length: int, fill: int) -> Tensor:
    grid = np.full((len(rows), length), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        grid[i, : len(row)] = row
    return torch.from_numpy(grid)


def _positions(rows: Sequence[_Row], *, length: int) -> Tensor:
    axes = [
        _grid([row.positions[axis] for row in rows], length=length, fill=0)
        for axis in range(len(rows[0].positions))
    ]
    return axes[0] if len(axes) == 1 else torch.stack(axes)


def _flat(columns: Sequence[Sequence[int]], *, starts: np.ndarray) -> np.ndarray:
    parts = [np.asarray(row, dtype=np.int64) + start for row, start in zip(columns, starts, strict=True)]
    return np.concatenate(parts)


def _target_questions(rows: Sequence[_Row]) -> Tensor:
    lengths = np.asarray([n for row in rows for n in row.answer_lengths], dtype=np.int64)
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))


def _long(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
