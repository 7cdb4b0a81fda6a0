"""A CLIP tokenizer trained on the captions at hand, of the class and file layout of the published ones."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(
    captions: Iterable[str], *, vocab_size: int, max_length: int, min_frequency: int = 2
) -> CLIPTokenizer:
    """Learn byte-level BPE merges and hand them to a stock ``CLIPTokenizer``.

    The vocabulary is laid out as in the published CLIP: 256 bytes, the same 256 ending a word, the merges,
    start and end of text. So no text is ever unknown: an unknown token would be the end token, and the text
    model would read its summary in the middle of the caption.

    Args:
        captions: training text, read once.
        vocab_size: upper bound of the vocabulary, at least 514.
        max_length: ``model_max_length``; also the length prompts are padded to.
        min_frequency: pairs seen less often are not merged.

    Returns:
        the tokenizer; its end token has the highest id, and pads.
    """
    assert vocab_size >= 514, "256 bytes, twice, and two special tokens"
    blank = CLIPTokenizer()
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer=trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - 514]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), _START, _END]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
