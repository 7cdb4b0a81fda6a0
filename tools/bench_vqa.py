"""Questions behind one shared history against asking them one by one: examples per second beside the bound.

Three comparisons, each with its logits compared as well: every question with an image of its own; questions
without one; and the plain way of training on a pair of targets (two whole forward passes, one behind the
liked and one behind the disliked target, all images encoded in each). The bound is the number of tokens one
by one over the number of tokens packed. Times are medians of interleaved repeats of forward and backward
with LoRA.

    python tools/bench_vqa.py                          # the mini MLLM
    python tools/bench_vqa.py --mllm FOLDER --device cuda --dtype bfloat16 --attention sdpa
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefgen.models.lora import add_lora
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, Question, pack_batch
from prefgen.models.questions import LIKES_WORDS, history_pieces, like_question
from prefgen.stages.features import model_source


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured on, and how often."""

    mllm: MLLM
    pixels: Tensor
    users: int
    references: int
    repeats: int

    def items(self, questions: int, *, targets: bool) -> list[PackItem]:
        """Unequal histories around the number of references, with so many questions each."""
        items, row = [], 0
        for user in range(self.users):
            liked = self.references // 2 + (user % 3 - 1 if self.users > 2 else 0)
            disliked = self.references - self.references // 2
            rows = [(row + i) % len(self.pixels) for i in range(liked + disliked + questions)]
            row += len(rows)
            asked: list[Question] = []
            for number in range(questions):
                if targets:
                    asked.append(like_question(rows[liked + disliked + number], liked=bool(number % 2)))
                else:
                    asked.append(Question(pieces=[f"{number + 1}. {LIKES_WORDS}"], answer="Yes"))
            history = history_pieces(rows[:liked], disliked=rows[liked : liked + disliked])
            items.append(PackItem(history=history, questions=asked))
        return items

    def step(self, passes: Sequence[Sequence[PackItem]], *, features: Tensor | None) -> None:
        """Forward and backward of each pass; without features its images are encoded in it, each once."""
        for items in passes:
            batch = pack_batch(self.mllm.encoder, items=items).to(self.mllm.device)
            if features is None:
                rows = batch.image_rows.unique().cpu()
                used = self.mllm.encode_images(self.pixels[rows])
                whole = used.new_zeros(len(self.pixels), *used.shape[1:])
                whole[rows.to(used.device)] = used
            else:
                whole = features
            self.mllm.answer_loss(batch, image_features=whole).backward()

    @torch.no_grad()
    def logits(self, passes: Sequence[Sequence[PackItem]], *, features: Tensor) -> Tensor:
        """(questions, V) where the answers start, in the order of the passes."""
        parts = []
        for items in passes:
            batch = pack_batch(self.mllm.encoder, items=items).to(self.mllm.device)
            hidden = self.mllm.hidden(batch, image_features=features)
            parts.append(self.mllm.logits_at(hidden, batch.reading_points).float().cpu())
        return torch.cat(parts)

    def tokens(self, passes: Sequence[Sequence[PackItem]]) -> int:
        """Tokens that are no padding."""
        batches = [pack_batch(self.mllm.encoder, items=items) for items in passes]
        return sum(int((batch.segments >= 0).sum()) for batch in batches)

    def seconds(self, *works: Callable[[], None]) -> list[float]:
        """Median time of each, measured in turns so that a busy moment hits all alike."""
        times: list[list[float]] = [[] for _ in works]
        for turn in range(self.repeats + 1):
            for number, work in enumerate(works):
                start = time.perf_counter()
                work()
                if self.mllm.device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first turn warms up
                    times[number].append(time.perf_counter() - start)
        return [statistics.median(one) for one in times]


def one_by_one(items: Sequence[PackItem]) -> list[list[PackItem]]:
    """The same questions, question number k of every user in pass k."""
    counts = range(len(items[0].questions))
    return [[PackItem(history=i.history, questions=[i.questions[k]]) for i in items] for k in counts]


def compare(bench: Bench, questions: int, *, targets: bool, features: Tensor | None, cached: Tensor) -> None:
    """One line of the table."""
    items = bench.items(questions, targets=targets)
    plain = one_by_one(items)
    packed, alone = bench.seconds(
        lambda: bench.step([items], features=features), lambda: bench.step(plain, features=features)
    )
    together = bench.logits([items], features=cached).view(bench.users, questions, -1)
    apart = bench.logits(plain, features=cached).view(questions, bench.users, -1).transpose(0, 1)
    bound = bench.tokens(plain) / bench.tokens([items])
    asked, gain = bench.users * questions, alone / packed
    target, images = "own image" if targets else "none", "each step" if features is None else "cached"
    print(
        f"| {questions} | {target} | {images} | {asked / packed:,.1f} | {asked / alone:,.1f} | {gain:.2f} "
        f"| {bound:.2f} | {gain / bound:.2f} | {float((together - apart).abs().max()):.1e} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mllm", default="asset:mini/mllm", help="folder or hub id")
    parser.add_argument("--users", type=int, default=8, help="histories in a batch")
    parser.add_argument("--references", type=int, default=10, help="images in a history")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 8], help="questions a history")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", default="eager", help="attention code of transformers")
    options = parser.parse_args()
    mllm = MLLM.load(
        model_source(options.mllm),
        dtype=getattr(torch, options.dtype),
        device=options.device,
        attention=options.attention,
    )
    add_lora(mllm, rank=8)
    side, images = mllm.image_size, options.users * (options.references + max(options.questions))
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    bench = Bench(
        mllm=mllm,
        pixels=pixels,
        users=options.users,
        references=options.references,
        repeats=options.repeats,
    )
    cached = mllm.encode_images(pixels)
    print(f"{options.mllm} ({mllm.family.name}), {options.dtype}, {options.attention}, {mllm.device}")
    machine = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine}")
    tokens = mllm.encoder.format.tokens_per_image
    print(f"{options.users} users, {options.references} references, {tokens} tokens an image")
    print(
        "| questions | target | images | packed/s | one by one/s | gain | bound | share | logits differ by |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for targets in (True, False):
        for count in options.questions:
            compare(bench, count, targets=targets, features=cached, cached=cached)
    print("\nAgainst two whole passes for a liked and a disliked target, images encoded in every pass:")
    compare(bench, 2, targets=True, features=None, cached=cached)


if __name__ == "__main__":
    main()
