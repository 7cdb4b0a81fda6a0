"""What an importer gives to the engine: sections of a source, each read as batches that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefgen.schema import Side, Source

Verdict = Side | Literal["tie"]


@dataclass(frozen=True, slots=True)
class Unusable:
    """An image that cannot be had, and why: ``missing``, ``too large``, ``not a regular file``."""

    reason: str


Payload = bytes | str | Unusable
"""An image: its encoded bytes, the name under which a later batch brings them, or why there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One image that one user judged.

    Attributes:
        user_id: whose judgement it is; unique over the whole source.
        verdict: the side it belongs to, or ``tie`` when the user preferred neither of two.
        image: see :data:`Payload`.
        prompt: what the image was made for; empty when unknown.
        where: file and row, for messages.
    """

    user_id: str
    verdict: Verdict
    image: Payload
    prompt: str = ""
    where: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taste:
    """What a simulated user is known to like and dislike, in words."""

    user_id: str
    liked_attributes: tuple[str, ...]
    disliked_attributes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A small piece of a section: a row, a record or a tar member. The engine groups them itself.

    Attributes:
        position: where reading goes on after this batch: what ``Section.read`` takes.
        done: how much of ``Section.size`` lies behind.
        judgements: in the order of the source.
        pictures: images that judgements named, with their names.
        tastes: attributes of users met in earlier batches.
        skipped: judgements the importer cannot use, by reason.
    """

    position: int
    done: int
    judgements: tuple[Judgement, ...] = ()
    pictures: tuple[tuple[str, bytes | Unusable], ...] = ()
    tastes: tuple[Taste, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Desk:
    """What the engine lends to a section while it is read.

    Attributes:
        scratch: a folder for temporary files; emptied before each section.
        wanted: whether a judgement named this image and has not got it yet.
    """

    scratch: Path
    wanted: Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a source that is read from front to back.

    Attributes:
        name: for messages; part of what an interrupted import must find again.
        files: whole files it reads, for the report's checksums.
        size: in the source's unit.
        read: batches from a position on; a pure function of the files and the position.
    """

    name: str
    files: tuple[Path, ...]
    size: int
    read: Callable[[int, Desk], Iterator[Batch]]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source that was found to have the right layout.

    Attributes:
        importer: its name on the command line.
        root: folder (of the file) given; names in the report are relative to it.
        source: who judged.
        sections: in reading order.
        unit: of ``Section.size``: ``B`` for bytes, or what is counted.
        notes: what a reader of the data card should know about how this layout was understood.
    """

    importer: str
    root: Path
    source: Source
    sections: tuple[Section, ...]
    unit: str = "B"
    notes: tuple[str, ...] = ()
