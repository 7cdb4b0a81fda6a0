"""Draw agents' histories and captioned drawings with all cores, the same whatever their number.

Every image is a pure function of (seed, user or index, position), whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from prefgen.data.agents.drawings import OPENMOJI
from prefgen.data.agents.painters import paint
from prefgen.data.agents.subjects import Concept, Subjects, pick_picture
from prefgen.data.agents.world import (
    ATTRIBUTE_GROUPS,
    GROUPS,
    NUM_VALUES,
    TasteModel,
    attribute_names,
    draw_agent,
    draw_values,
    taste_matrix,
)
from prefgen.errors import DataError
from prefgen.schema import RatedImage, Side, Split, UserHistory
from prefgen.whole_file import whole_file

HISTORY_FILE = "history.jsonl"

DrawingSplit = Literal["train", "staged", "studies", "heldout", "judge"]

PLAIN = {"background": "plain white", "composition": "centered", "finish": "clean edges"}
"""The values that hide and deform a subject least; studies show every subject under them."""

SHOWN_PLAINLY: Mapping[DrawingSplit, tuple[str, ...]] = {"studies": tuple(PLAIN), "staged": ("composition",)}
"""Groups whose plain value every drawing of a split takes."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class AgentsPlan:
    """What ``prefgen data agents`` makes.

    Attributes:
        num_users: agents per split. Test agents judge test concepts only, the others never see one.
        min_images: fewest images on each side of a history.
        max_images: most images on each side; the two sides are drawn independently, so they differ.
        image_size: side of the images in pixels.
        seed: of everything.
        taste: how agents care.
        subjects: what the images show.
    """

    num_users: dict[Split, int]
    min_images: int = 16
    max_images: int = 26
    image_size: int = 64
    seed: int = 0
    taste: TasteModel = field(default_factory=TasteModel)
    subjects: Subjects = OPENMOJI

    def __post_init__(self) -> None:
        if not 1 <= self.min_images <= self.max_images:
            raise DataError(
                f"images a side: expected 1 <= smallest <= largest, got {self.min_images}, {self.max_images}"
            )
        if any(count < 0 for count in self.num_users.values()) or not sum(self.num_users.values()):
            raise DataError(
                f"number of users: expected counts >= 0 and at least one user, got {self.num_users}"
            )


@dataclass(frozen=True)
class Drawing:
    """One captioned drawing: its subject phrase, family, attribute names and encoded image."""

    key: str
    phrase: str
    family: str
    attributes: tuple[str, ...]
    image: bytes


def generator_for(seed: int, *parts: str | int) -> np.random.Generator:
    """Random generator that depends on its arguments only, never on the process."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


def encode_webp(
    concept: Concept,
    values: npt.NDArray[np.int64],
    *,
    subjects: Subjects,
    size: int,
    rng: np.random.Generator,
) -> bytes:
    """Paint and encode losslessly: a lossy codec would blur the very attributes that are to be judged."""
    buffer = io.BytesIO()
    drawn = subjects.layers(pick_picture(concept, rng=rng))
    paint(drawn, values, size=size, rng=rng).save(buffer, "webp", lossless=True, quality=20, method=0)
    return buffer.getvalue()


def agent_history(position: int, split: Split, *, plan: AgentsPlan) -> tuple[UserHistory, dict[str, bytes]]:
    """Draw one agent and its whole history.

    Args:
        position: number of the agent within its split.
        split: which split; it decides the concepts and starts the user id.
        plan: everything else.

    Returns:
        The history, with image paths relative to its file, and the encoded image behind each path.
    """
    user_id = f"{split}-{position:06d}"
    rng = generator_for(plan.seed, "agent", user_id)
    agent = draw_agent(rng, user_id=user_id, split=split, model=plan.taste)
    pool = [concept for concept in plan.subjects.concepts() if concept.test == (split == "test")]
    taste = taste_matrix(agent)
    images: dict[str, bytes] = {}
    sides: dict[Side, tuple[RatedImage, ...]] = {}
    signs: tuple[tuple[Side, int], ...] = (("liked", 1), ("disliked", -1))
    for side, sign in signs:
        count = int(rng.integers(plan.min_images, plan.max_images + 1))
        values = draw_values(rng, taste=taste, beta=sign * plan.taste.beta, count=count)
        rated = []
        for i in range(count):
            concept = pool[int(rng.integers(len(pool)))]
            path = f"images/{user_id}/{side}-{i:03d}.webp"
            images[path] = encode_webp(
                concept, values[i], subjects=plan.subjects, size=plan.image_size, rng=rng
            )
            rated.append(RatedImage(image=path, prompt=concept.phrase, attributes=attribute_names(values[i])))
        sides[side] = tuple(rated)
    history = UserHistory(
        user_id=user_id,
        source="agent",
        liked=sides["liked"],
        disliked=sides["disliked"],
        liked_attributes=agent.liked_attributes,
        disliked_attributes=agent.disliked_attributes,
        split=split,
    )
    return history, images


def write_agents(out: Path, *, plan: AgentsPlan, num_workers: int | None = None) -> Path:
    """Draw every agent's history into ``out``.

    ``history.jsonl`` is written last and renamed into place, so a run that was killed leaves no file that
    looks complete.

    Args:
        out: folder to make; must not hold a history yet.
        plan: what to draw.
        num_workers: processes; all cores when None.

    Returns:
        The path of ``history.jsonl``.

    Raises:
        DataError: the pictures cannot be had, there are no subjects for a split, or ``out`` holds a history
            already.
    """
    plan.subjects.check()
    for split, count in plan.num_users.items():
        if count and not any(one.test == (split == "test") for one in plan.subjects.concepts()):
            raise DataError(f"no subject is for {split} agents; ask for 0 of them")
    target = out / HISTORY_FILE
    if target.exists():
        raise DataError(f"{target} exists; choose another --out or remove it first")
    (out / "images").mkdir(parents=True, exist_ok=True)
    jobs = [(i, split) for split, count in plan.num_users.items() for i in range(count)]
    with whole_file(target) as part:
        with part.open("w", encoding="utf-8") as lines:
            work = partial(_write_agent, out=out, plan=plan)
            for line in _parallel(
                work, jobs, num_workers=num_workers, unit="user", title="drawing histories"
            ):
                lines.write(line + "\n")
        (out / "SOURCE.txt").write_text(
            f"{plan.subjects.attribution}\nMade by `prefgen data agents`, seed {plan.seed}.\n"
        )
    return target


def _write_agent(job: tuple[int, Split], *, out: Path, plan: AgentsPlan) -> str:
    history, images = agent_history(*job, plan=plan)
    for path, data in images.items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_bytes(data)
    return json.dumps(history.to_json(), ensure_ascii=False)


def seen_values(concept: Concept, *, seed: int) -> list[npt.NDArray[np.int64]]:
    """Values of each group under which the base models may see a concept: all, or half for a test concept."""
    if not concept.test:
        return [np.arange(NUM_VALUES) for _ in GROUPS]
    rng = generator_for(seed, "seen", concept.name)
    return [np.sort(rng.permutation(NUM_VALUES)[: NUM_VALUES // 2]) for _ in GROUPS]


def drawing(
    index: int, *, split: DrawingSplit, seed: int, image_size: int, subjects: Subjects = OPENMOJI
) -> Drawing:
    """Draw one captioned image of the foundation's data: any concept, attributes uniform.

    Args:
        index: number of the drawing.
        split: ``train`` shows test concepts under half of the values of each group; ``studies`` and
            ``staged`` show all concepts in the middle, the former plainly (:data:`PLAIN`), the latter among
            backgrounds and finishes of their half, for a base model to learn what they look like;
            ``heldout`` (for gates) and ``judge`` (for the judge alone) come from streams of their own and
            show all values.
        seed: of the whole set.
        image_size: side in pixels.
        subjects: what is drawn.
    """
    rng = generator_for(seed, "drawing" if split == "train" else split, index)
    concept = subjects.concepts()[int(rng.integers(len(subjects.concepts())))]
    allowed = seen_values(concept, seed=seed)
    limited = split in ("train", "staged", "studies")
    values = np.array([rng.choice(choice) if limited else rng.integers(NUM_VALUES) for choice in allowed])
    for group in SHOWN_PLAINLY.get(split, ()):
        place = GROUPS.index(group)
        values[place] = ATTRIBUTE_GROUPS[group].index(PLAIN[group])
    return Drawing(
        key=f"{index:07d}",
        phrase=concept.phrase,
        family=concept.family,
        attributes=attribute_names(values),
        image=encode_webp(concept, values, subjects=subjects, size=image_size, rng=rng),
    )


def write_drawings(
    out: Path,
    *,
    counts: Mapping[DrawingSplit, int],
    seed: int = 0,
    image_size: int = 64,
    shard_size: int = 5000,
    num_workers: int | None = None,
    subjects: Subjects = OPENMOJI,
) -> list[Path]:
    """Write captioned shards for the foundation: ``train-000000.tar`` .. and likewise for each split.

    A sample is ``KEY.webp`` and ``KEY.json`` with ``prompt``, ``attributes`` and ``family``; the meaning of
    attribute words (their groups), and the prompts no MLLM may train on (``unseen``), are in
    ``attributes.json`` beside the shards.

    Raises:
        DataError: the pictures cannot be had, or ``out`` holds shards already.
    """
    import webdataset

    subjects.check()
    if list(out.glob("*.tar")):
        raise DataError(f"{out} holds shards already; choose another --out or remove them first")
    out.mkdir(parents=True, exist_ok=True)
    groups = {group: list(values) for group, values in ATTRIBUTE_GROUPS.items()}
    unseen = [concept.phrase for concept in subjects.concepts() if concept.test]
    about = {"attribution": subjects.attribution, "seed": seed, "groups": groups, "unseen": unseen}
    (out / "attributes.json").write_text(json.dumps(about, indent=1))
    paths = []
    for split, count in counts.items():
        work = partial(drawing, split=split, seed=seed, image_size=image_size, subjects=subjects)
        made = _parallel(work, range(count), num_workers=num_workers, unit="image", title=f"drawing {split}")
        for number in range((count + shard_size - 1) // shard_size):
            path = out / f"{split}-{number:06d}.tar"
            with whole_file(path) as part, webdataset.TarWriter(str(part), mtime=0) as tar:
                for item in islice(made, shard_size):
                    about = {"prompt": item.phrase, "attributes": item.attributes, "family": item.family}
                    tar.write({"__key__": item.key, "webp": item.image, "json": about})
            paths.append(path)
    return paths


def _parallel(
    work: Callable[[T], R], jobs: Iterable[T], *, num_workers: int | None, unit: str, title: str
) -> Iterator[R]:
    """Results in the order of the jobs, with a progress bar that shows the rate."""
    listed = list(jobs)
    workers = min(num_workers or os.cpu_count() or 1, max(1, len(listed)))
    if workers == 1:
        yield from tqdm(map(work, listed), total=len(listed), unit=unit, desc=title)
        return
    # spawn: a fork would inherit the threads of a parent that has imported torch, and may hang
    context = multiprocessing.get_context("spawn")
    chunk = max(1, min(64, len(listed) // (workers * 4)))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = pool.map(work, listed, chunksize=chunk)
        yield from tqdm(results, total=len(listed), unit=unit, desc=title)
