"""Importer of PrefBench: json records, pickled attributes, and images in tar parts without an index."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prefgen.data.images import MAX_IMAGE_BYTES
from prefgen.data.sources.base import Batch, Desk, Judgement, Opened, Payload, Section, Taste, Unusable
from prefgen.data.sources.files import (
    JoinedFile,
    check_inside,
    check_relative,
    json_list,
    natural_order,
    read_image,
    source_folder,
    text_field,
    text_list,
)
from prefgen.data.sources.pickles import load_plain
from prefgen.errors import DataError

SPLITS = ("diffusiondb", "coco")
LAYOUT = "json/NAME.json, pkl/NAME.pkl and NAME.tar.part-*, for diffusiondb or coco"
_TASTES = 256


def open_source(path: Path) -> Opened:
    """Look at a folder of PrefBench; either of its two halves will do.

    Args:
        path: holds ``json``, ``pkl`` (may be missing) and the tar parts, or folders they were unpacked into.

    Raises:
        DataError: neither half is there, or one has records and no images.
    """
    root = source_folder(path, layout=LAYOUT)
    sections: list[Section] = []
    for name in SPLITS:
        if (root / "json" / f"{name}.json").is_file():
            sections += _half(root, name=name)
    if not sections:
        raise DataError(f"{root}: no json/diffusiondb.json or json/coco.json; expected {LAYOUT}")
    notes = (
        "users are simulated; their ids carry the name of their half, since both count from 0",
        "the target image of a record counts as liked, with the record's text as its prompt",
    )
    return Opened(importer="prefbench", root=root, source="agent", sections=tuple(sections), notes=notes)


def _half(root: Path, *, name: str) -> Iterator[Section]:
    records, tastes = root / "json" / f"{name}.json", root / "pkl" / f"{name}.pkl"
    parts = natural_order([*root.glob(f"{name}.tar.part-*"), *root.glob(f"{name}/{name}.tar.part-*")])
    unpacked = not parts and (root / name).is_dir()
    if not parts and not unpacked:
        raise DataError(f"{root}: no images for {records.name}; expected {name}.tar.part-* beside json/")
    for file in (records, *parts, *[tastes][: tastes.is_file()]):
        check_inside(file, root=root)
    yield Section(
        name=f"json/{records.name}",
        files=(records,),
        size=records.stat().st_size,
        read=partial(_read_records, records, name=name, root=root if unpacked else None),
    )
    if tastes.is_file():
        yield Section(
            name=f"pkl/{tastes.name}",
            files=(tastes,),
            size=tastes.stat().st_size,
            read=partial(_read_tastes, tastes, name=name),
        )
    if parts:
        yield Section(
            name=f"{name}.tar",
            files=tuple(parts),
            size=sum(part.stat().st_size for part in parts),
            read=partial(_read_tar, tuple(parts), name=name),
        )


def _read_records(file: Path, start: int, desk: Desk, *, name: str, root: Path | None) -> Iterator[Batch]:
    for number, record, done in json_list(file):
        if number >= start:
            where = f"json/{file.name}: record {number}"
            judgements = tuple(_judgements(record, name=name, root=root, where=where))
            yield Batch(position=number + 1, done=done, judgements=judgements)


def _judgements(record: Any, *, name: str, root: Path | None, where: str) -> Iterator[Judgement]:
    user_id = f"{name}-{text_field(record, name='id', where=where)}"

    def image(path: str) -> Payload:
        path = _image_name(path, name=name, where=where)
        return path if root is None else read_image(path, root=root, where=where)

    positive = text_list(record, name="positive_img", where=where)
    negative = text_list(record, name="negative_img", where=where)
    prompts = text_list(record, name="prompt_list", where=where)
    if not len(positive) == len(negative) == len(prompts):
        raise DataError(
            f"{where}: positive_img, negative_img and prompt_list must be of one length, "
            f"got {len(positive)}, {len(negative)}, {len(prompts)}"
        )
    for liked, disliked, prompt in zip(positive, negative, prompts, strict=True):
        yield Judgement(user_id=user_id, verdict="liked", image=image(liked), prompt=prompt, where=where)
        yield Judgement(
            user_id=user_id, verdict="disliked", image=image(disliked), prompt=prompt, where=where
        )
    target = text_field(record, name="image_file", where=where)
    text = text_field(record, name="text", where=where)
    yield Judgement(user_id=user_id, verdict="liked", image=image(target), prompt=text, where=where)


def _image_name(path: str, *, name: str, where: str) -> str:
    """``coco/x.png`` whether written so, as ``./x.png`` or as ``x.png``."""
    check_relative(path, where=where)
    return f"{name}/" + path.removeprefix("./").removeprefix(f"{name}/")


def _read_tastes(file: Path, start: int, desk: Desk, *, name: str) -> Iterator[Batch]:
    """Attributes lie at the end of each user's list, disliked first."""
    users = load_plain(file)
    if not isinstance(users, dict):
        raise DataError(f"{file}: expected a dict by user, got {type(users).__name__}")
    found = []
    for user, entry in users.items():
        last = entry[-1] if isinstance(entry, list) and entry else None
        if not isinstance(last, list | tuple) or len(last) != 2:
            raise DataError(f"{file}: user {user!r} does not end with [negative, positive] attributes")
        disliked, liked = (_words(words, where=f"{file}: user {user!r}") for words in last)
        found.append(Taste(user_id=f"{name}-{user}", liked_attributes=liked, disliked_attributes=disliked))
    size = file.stat().st_size
    for first in range(start, len(found), _TASTES):
        tastes = tuple(found[first : first + _TASTES])
        last_place = first + len(tastes)
        yield Batch(position=last_place, done=size * last_place // len(found), tastes=tastes)


def _words(value: Any, *, where: str) -> tuple[str, ...]:
    """A list of words, or one text with commas."""
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: attributes must be text, got {type(value).__name__}")
    return tuple(word.strip() for word in words if word.strip())


def _read_tar(parts: tuple[Path, ...], start: int, desk: Desk, *, name: str) -> Iterator[Batch]:
    """Wanted members of the joined parts; the position is the byte of the next header."""
    where = f"{name}.tar ({len(parts)} parts)"
    try:
        # Buffered, because a plain read may stop where a part ends.
        with io.BufferedReader(JoinedFile(parts)) as joined:
            joined.seek(start)
            # At `start` lies a header, so a tar file begins there as well as at 0.
            with tarfile.open(fileobj=joined, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would remember every member
                    picture = _member(tar, member, name=name, where=where, desk=desk)
                    pictures = () if picture is None else (picture,)
                    yield Batch(position=tar.offset, done=tar.offset, pictures=pictures)
            joined.seek(tar.offset)
            if joined.read(512) != bytes(512):
                raise DataError(f"{where}: ends early at byte {tar.offset:,}; is a part missing or cut off?")
    except tarfile.TarError as error:
        raise DataError(f"{where}: damaged ({error}); is a part missing or cut off?") from None


def _member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, *, name: str, where: str, desk: Desk
) -> tuple[str, bytes | Unusable] | None:
    here = f"{where}: member {member.name[:120]!r}"
    if member.isdir():
        return None
    if not member.isreg():
        raise DataError(f"{here} is a link or a device, which is refused")
    image = _image_name(member.name, name=name, where=here)
    if not desk.wanted(image):
        return None
    if member.size > MAX_IMAGE_BYTES:
        return image, Unusable("too large")
    file = tar.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise DataError(f"{here} is cut off; is a part missing?")
    return image, data
