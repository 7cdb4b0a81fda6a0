"""What stands around words and images in a prompt, and text to ids.

Every image takes the same number of tokens. In families with two-dimensional positions (Qwen's M-RoPE) these
tokens form a square: :func:`positions` says where each token stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefgen.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from prefgen.models.packing import PackItem

Piece = str | int
"""Text, or the row of ``image_features`` of one image."""

_TEXT_CACHE_SIZE = 65536


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """What stands around the words and images of one model.

    Attributes:
        opening: text before the history (begin of text, "User:").
        before_answer: text between a question and its answer ("Assistant:").
        answer_lead: text put in front of every answer (a space where the template writes one).
        after_answer: text after an answer; its first token ends a generated answer.
        image_opening: text before the tokens of an image.
        image_closing: text after them.
        image_token: the placeholder token.
        tokens_per_image: how many placeholders one image takes.
        shared_wrapping: one closing between two images that touch is also the opening of the second, and a
            word right behind an image is set apart by a space (Idefics2).
        image_side: tokens along a side of an image with two-dimensional positions; 0 counts tokens in a row.
    """

    opening: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    after_answer: str = ""
    image_opening: str = ""
    image_closing: str = ""
    image_token: str = "<image>"
    tokens_per_image: int = 1
    shared_wrapping: bool = False
    image_side: int = 0

    def wrapped(self, pieces: Sequence[Piece], *, after_image: bool = False) -> list[Piece]:
        """The pieces as text, image, text, image, .., text with what stands around images written out.

        Args:
            pieces: words and images.
            after_image: whether an image, with its closing, stands right before them.
        """
        written: list[Piece] = []
        text = ""
        touching = after_image
        for piece in pieces:
            if isinstance(piece, str):
                apart = self.shared_wrapping and touching and piece and not piece[0].isspace()
                text += " " + piece if apart and not piece.startswith("<") else piece
                touching = touching and not piece
                continue
            written += [text if self.shared_wrapping and touching else text + self.image_opening, piece]
            text, touching = self.image_closing, True
        return [*written, text]

    def text(self, item: PackItem, *, question: int) -> str:
        """One question as the plain string a processor would see after placeholder expansion."""
        asked = item.questions[question]
        words: list[Piece] = [self.opening, *item.history, *asked.pieces, self.before_answer]
        if asked.answer is not None:
            words += [self.answer_lead + asked.answer + self.after_answer]
        image = self.image_token * self.tokens_per_image
        return "".join(image if isinstance(word, int) else word for word in self.wrapped(words))


@dataclass
class PromptEncoder:
    """Text to ids for one tokenizer and format; each distinct text is tokenized once and remembered."""

    tokenizer: Any
    format: PromptFormat
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder."""
        return self.text_ids(self.format.image_token)[0]

    @property
    def stop_id(self) -> int | None:
        """Id that ends a generated answer; None if the format closes an answer with nothing."""
        ids = self.text_ids(self.format.after_answer)
        return ids[0] if ids else None

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without any special token the tokenizer would add by itself."""
        ids = self._known.get(text)
        if ids is None:
            if len(self._known) >= _TEXT_CACHE_SIZE:
                self._known.clear()
            ids = list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []
            self._known[text] = ids
        return ids

    def first_ids(self, answers: Sequence[str]) -> list[int]:
        """First token of each answer, to compare their logits where the answer starts.

        Raises:
            DataError: two answers start with the same token, so no logit tells them apart.
        """
        ids = [self.text_ids(self.format.answer_lead + answer)[0] for answer in answers]
        if len(set(ids)) != len(ids):
            raise DataError(f"answers {list(answers)} share a first token under this tokenizer; reword them")
        return ids

    def segment(
        self, pieces: Sequence[Piece], *, after_image: bool = False
    ) -> tuple[list[int], list[int], list[int]]:
        """Ids, offsets of the first placeholder of each image, and the row of each image."""
        placeholders = [self.image_token_id] * self.format.tokens_per_image
        ids: list[int] = []
        offsets: list[int] = []
        rows: list[int] = []
        for piece in self.format.wrapped(pieces, after_image=after_image):
            if isinstance(piece, str):
                ids += self.text_ids(piece)
                continue
            offsets.append(len(ids))
            rows.append(int(piece))
            ids += placeholders
        return ids, offsets, rows


def positions(
    form: PromptFormat, *, length: int, images: Sequence[int], start: int
) -> tuple[NDArray[np.int64], int]:
    """Where the tokens of a segment stand.

    Args:
        form: the format.
        length: tokens of the segment.
        images: offsets of the first token of each image in it.
        start: position of the segment's first token.

    Returns:
        (axes, length) positions, one axis or (time, height, width), and the position of what comes next. An
        image of side s stands at one time, spreads over s heights and widths, and what follows it stands s
        further, not s * s.
    """
    side = form.image_side
    if not side:
        return np.arange(start, start + length)[None], start + length
    axes = np.empty((3, length), dtype=np.int64)
    grid = np.arange(side * side)
    square = np.stack([np.zeros_like(grid), grid // side, grid % side])
    column, cursor = 0, start
    for offset in images:
        axes[:, column:offset] = cursor + np.arange(offset - column)
        cursor += offset - column
        column = offset + side * side
        axes[:, offset:column] = cursor + square
        cursor += side
    axes[:, column:] = cursor + np.arange(length - column)
    return axes, cursor + length - column


def chat_format(tokenizer: Any, *, images: PromptFormat) -> PromptFormat:
    """Read what a chat template writes around question and answer, by rendering it with two marks.

    Args:
        tokenizer: with its chat template, or with none.
        images: what the family writes around images; the rest of it is replaced.

    Raises:
        CheckpointError: the template loses or repeats a mark.
    """
    if tokenizer.chat_template is None:
        return replace(images, answer_lead=" ")
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
    return replace(
        images,
        opening=opening,
        before_answer=before.rstrip(" "),
        answer_lead=lead,
        after_answer=after.rstrip(),
    )
