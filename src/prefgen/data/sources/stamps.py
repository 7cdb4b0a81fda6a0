"""Tux Paint's stamps as subjects: pictures cut out of photos, and cartoons, each with a sentence.

The layout is that of Debian's ``tuxpaint-stamps-default`` below ``/usr/share/tuxpaint/stamps``: anywhere in
the tree ``NAME.png`` or ``NAME.svg``, transparent around its subject, with ``NAME.txt`` whose first line is
an English sentence and whose others translate it; sounds, ``NAME.dat`` and ``NAME_mirror.png`` are left
alone. The topmost folder is the subject's family; what is an SVG or lies in a folder ``cartoon`` counts as a
cartoon.

Which stamps become subjects is ours: see :data:`REASONS`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from prefgen.data.agents.cutouts import SUBJECTS_FILE, SUBJECTS_VERSION
from prefgen.data.agents.subjects import CANVAS, cut, filled, square_around
from prefgen.data.agents.world import ATTRIBUTE_GROUPS, ATTRIBUTES
from prefgen.data.images import decode_cutout
from prefgen.data.sources.base import Unusable
from prefgen.data.sources.files import read_image, source_folder
from prefgen.errors import DataError
from prefgen.whole_file import write_json

LAYOUT = "Tux Paint's tree of stamps: FAMILY/../NAME.png or NAME.svg with NAME.txt"
ATTRIBUTION = "Pictures: Tux Paint stamps (tuxpaint.org), GPL-2, modified."

REASONS = {
    "no picture": "a sentence without a picture",
    "no sentence": "not a line of English",
    "no thing": "the sentence does not start with a, an or some",
    "too long": "more words than --max-words",
    "names an attribute": "or a colour, which would contradict the palette: a green apple in crimson",
    "needs resvg-py": "an SVG; pip install 'prefgen[mini]' brings what draws it",
    "cannot be drawn": "damaged, too large, or an SVG that refers to other files",
    "not cut out": "it fills its frame, or hardly anything is left at 64 pixels",
    "enough pictures": "its phrase has --max-pictures already",
    "enough subjects": "--max-subjects were taken",
}
"""Why a stamp is left out."""

Kind = Literal["photo", "cartoon"]

_SIDE = 2 * CANVAS
_ARTICLES = ("a", "an", "some")
_MORE_COLOURS = (
    "red", "blue", "green", "yellow", "purple", "black", "white", "grey", "silver", "gold", "colorful",
    "rainbow",
)  # fmt: skip
COLOURS = frozenset(word for name in ATTRIBUTE_GROUPS["palette"] for word in name.split()) | {*_MORE_COLOURS}
"""Words that a phrase may not hold."""

_COVERED = (0.06, 0.9)
"""Least and most part of its square that a subject may cover."""

_OUTSIDE = re.compile(rb"""<image\b[^>]*href\s*=\s*["'](?!data:)|<!ENTITY""", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class StampsPlan:
    """What is taken.

    Attributes:
        max_subjects: most subjects, shared out over the families; 0 for no limit.
        max_pictures: most pictures of one subject.
        max_words: most words of a phrase, its article among them.
        test_share: part of each family that is held out of every history.
        seed: of the choice among equally short phrases, and of what is held out.
    """

    max_subjects: int = 115
    max_pictures: int = 4
    max_words: int = 4
    test_share: float = 0.28
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_subjects < 0 or self.max_pictures < 1 or self.max_words < 2:
            raise DataError(
                "stamps: expected max_subjects >= 0, max_pictures >= 1, max_words >= 2; got "
                f"{self.max_subjects}, {self.max_pictures}, {self.max_words}"
            )
        if not 0 < self.test_share < 1:
            raise DataError(f"stamps: test_share must lie between 0 and 1, got {self.test_share}")


@dataclass(frozen=True)
class _Stamp:
    """One picture with its sentence, not opened yet."""

    name: str
    phrase: str
    family: str
    kind: Kind


def import_stamps(
    path: Path, *, out: Path, plan: StampsPlan, progress: Callable[[int, int], object] = lambda *_: None
) -> dict[str, Any]:
    """Cut out what can be used and write it into ``out`` as a folder of subjects.

    Args:
        path: the tree of stamps; nothing outside it is read.
        out: folder to make; ``subjects.json`` comes last.
        plan: what is taken.
        progress: called with the number of families finished and of all.

    Returns:
        The content of ``subjects.json``.

    Raises:
        DataError: not such a tree, nothing usable in it, a link that leads outside, or ``out`` is finished.
    """
    source_folder(path, layout=LAYOUT)
    if (out / SUBJECTS_FILE).exists():
        raise DataError(f"{out / SUBJECTS_FILE} exists; choose another --out or remove it first")
    left_out: dict[str, list[str]] = {reason: [] for reason in REASONS}
    families = _families(_stamps(path, plan=plan, left_out=left_out), seed=plan.seed)
    limits = _shares({name: len(phrases) for name, phrases in families.items()}, limit=plan.max_subjects)
    subjects: list[dict[str, Any]] = []
    missing = 0
    for number, (family, phrases) in enumerate(families.items()):
        # A family whose stamps turn out unusable leaves its share to the next ones.
        chosen: list[dict[str, Any]] = []
        wanted = limits[family] + missing
        for phrase, stamps in phrases:
            if len(chosen) == wanted:
                left_out["enough subjects"] += [stamp.name for stamp in stamps]
                continue
            pictures = _pictures(stamps, path=path, out=out, plan=plan, left_out=left_out)
            if pictures:
                name = phrase.partition(" ")[2]
                chosen.append({"name": name, "phrase": phrase, "family": family, "pictures": pictures})
        missing = wanted - len(chosen)
        subjects += _held_out(chosen, plan=plan)
        progress(number + 1, len(families))
    if not subjects:
        raise DataError(f"{path}: no stamp can be used; expected {LAYOUT}")
    content = {
        "version": SUBJECTS_VERSION,
        "attribution": ATTRIBUTION,
        "plan": vars(plan),
        "left_out": {reason: sorted(names) for reason, names in left_out.items() if names},
        "subjects": subjects,
    }
    write_json(out / SUBJECTS_FILE, content=content, ensure_ascii=False)
    return content


def _stamps(path: Path, *, plan: StampsPlan, left_out: dict[str, list[str]]) -> Iterable[_Stamp]:
    for text in sorted(file for file in path.rglob("*.txt") if file.is_file()):
        name = str(text.relative_to(path).with_suffix("").as_posix())
        picture = next(
            (f"{name}{end}" for end in (".svg", ".png") if (path / f"{name}{end}").is_file()), None
        )
        if picture is None:
            left_out["no picture"].append(name)
            continue
        data = read_image(f"{name}.txt", root=path, where=str(path))
        line = "" if isinstance(data, Unusable) else data.decode("utf-8", "replace").partition("\n")[0]
        phrase = phrase_of(line)
        reason = _unfit(phrase, plan=plan)
        if reason is not None:
            left_out[reason].append(name)
            continue
        drawn = picture.endswith(".svg") or "cartoon" in name.split("/")[:-1]
        yield _Stamp(
            name=picture, phrase=phrase, family=name.partition("/")[0], kind="cartoon" if drawn else "photo"
        )


def phrase_of(sentence: str) -> str:
    """What a caption may say of it: the first sentence in small letters, without brackets and quotes."""
    first = re.split(r"(?<=\w)[.!?](?:\s|$)", re.sub(r"\([^)]*\)", "", sentence.strip()))[0]
    plain = re.sub(r"[“”\"‘]", "", first.replace("’", "'"))
    return " ".join(plain.lower().strip(" .!?'").split())


def _unfit(phrase: str, *, plan: StampsPlan) -> str | None:
    words = phrase.split()
    if not words or "\N{REPLACEMENT CHARACTER}" in phrase:
        return "no sentence"
    if words[0] not in _ARTICLES or len(words) < 2:
        return "no thing"
    if len(words) > plan.max_words:
        return "too long"
    named = any(f" {name} " in f" {phrase} " for name in ATTRIBUTES)
    return "names an attribute" if named or COLOURS & {*phrase.replace("-", " ").split()} else None


def _families(stamps: Iterable[_Stamp], *, seed: int) -> dict[str, list[tuple[str, list[_Stamp]]]]:
    """Family -> its phrases with their stamps, the shortest phrases first."""
    found: dict[str, dict[str, list[_Stamp]]] = defaultdict(dict)
    homes: dict[str, str] = {}
    for stamp in stamps:
        home = homes.setdefault(stamp.phrase, stamp.family)  # a phrase in two families belongs to the first
        found[home].setdefault(stamp.phrase, []).append(stamp)
    return {
        family: sorted(found[family].items(), key=lambda item: (item[0].count(" "), _draw(seed, item[0])))
        for family in sorted(found)
    }


def _draw(seed: int, text: str) -> str:
    """A number, as text, that depends on the two alone."""
    return hashlib.sha256(f"{seed}\x1f{text}".encode()).hexdigest()


def _shares(sizes: dict[str, int], *, limit: int) -> dict[str, int]:
    """How many subjects each family gives: one after another in turn until the limit."""
    if not limit:
        return dict(sizes)
    shares = dict.fromkeys(sizes, 0)
    while sum(shares.values()) < min(limit, sum(sizes.values())):
        for family, size in sizes.items():
            if shares[family] < size and sum(shares.values()) < limit:
                shares[family] += 1
    return shares


def _held_out(chosen: list[dict[str, Any]], *, plan: StampsPlan) -> list[dict[str, Any]]:
    """The family's subjects, the marked share of them for test agents."""
    count = math.floor(plan.test_share * len(chosen) + 0.5)
    drawn = sorted(chosen, key=lambda record: _draw(plan.seed, "test " + record["phrase"]))[:count]
    names = {record["name"] for record in drawn}
    return [{**record, "test": record["name"] in names} for record in chosen]


def _pictures(
    stamps: list[_Stamp], *, path: Path, out: Path, plan: StampsPlan, left_out: dict[str, list[str]]
) -> list[dict[str, str]]:
    pictures: list[dict[str, str]] = []
    for stamp in stamps:
        if len(pictures) == plan.max_pictures:
            left_out["enough pictures"].append(stamp.name)
            continue
        image = _cut_out(stamp.name, path=path)
        if isinstance(image, str):
            left_out[image].append(stamp.name)
            continue
        file = out / "pictures" / Path(stamp.name).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, "png")
        pictures.append({"file": file.relative_to(out).as_posix(), "kind": stamp.kind, "from": stamp.name})
    return pictures


def _cut_out(name: str, *, path: Path) -> Image.Image | str:
    """The square around a stamp's subject, RGBA, or the reason why there is none."""
    data = read_image(name, root=path, where=str(path))
    if isinstance(data, Unusable):
        return "cannot be drawn"
    if name.endswith(".svg"):
        drawn = _draw_svg(data)
        if isinstance(drawn, str):
            return drawn
        data = drawn
    try:
        image = decode_cutout(data, where=name)
    except DataError:
        return "cannot be drawn"
    solid = image.getchannel("A").point(lambda value: 255 if value > 24 else 0)
    if solid.getbbox() is None:
        return "not cut out"
    picture = cut(image, square_around(solid), size=_SIDE)
    body = np.asarray(filled(picture.getchannel("A").resize((CANVAS, CANVAS))))
    covered = float((body > 128).mean())
    # A frame that is opaque to its corners is a rectangle, not a subject with something around it.
    framed = bool((np.asarray(solid.crop(solid.getbbox())) > 0).all())
    return "not cut out" if framed or not _COVERED[0] <= covered <= _COVERED[1] else picture


def _draw_svg(data: bytes) -> bytes | str:
    try:
        import resvg_py
    except ImportError:
        return "needs resvg-py"
    if _OUTSIDE.search(data):
        return "cannot be drawn"
    try:
        # Without a resolution, sizes in points and centimetres come out as nothing.
        drawn = resvg_py.svg_to_bytes(
            svg_string=data.decode("utf-8"), width=2 * _SIDE, dpi=96, skip_system_fonts=True
        )
    except ValueError:  # UnicodeDecodeError is one
        return "cannot be drawn"
    return bytes(drawn)
