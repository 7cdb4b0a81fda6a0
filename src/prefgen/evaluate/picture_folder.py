"""Drawn pictures as PNG files with one index, for people to look at: galleries and questionnaires.

``pictures.json`` lies beside one folder a user; its conditions are named there and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from prefgen.errors import DataError
from prefgen.inside import is_inside
from prefgen.whole_file import write_json

INDEX = "pictures.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PictureUser:
    """One user's files, relative to the folder.

    Attributes:
        user_id: the user.
        liked: what the user liked, shown to who judges.
        disliked: what the user disliked.
        prompts: P prompts.
        pictures: condition -> P files, from the same noise prompt by prompt.
        note: a line for a gallery, e.g. the figures the user was chosen by.
    """

    user_id: str
    liked: tuple[str, ...]
    disliked: tuple[str, ...]
    prompts: tuple[str, ...]
    pictures: Mapping[str, tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """An index that was read.

    Attributes:
        root: where the files lie.
        users: in order.
        attribution: who made the pictures.
    """

    root: Path
    users: tuple[PictureUser, ...]
    attribution: str = ""

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions that every user has, in the first user's order."""
        first = self.users[0].pictures
        return tuple(name for name in first if all(name in user.pictures for user in self.users))


def save_user_pictures(root: Path, *, name: str, sets: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Write sets of pixels (N,3,H,W) in [-1,1] as ``NAME/SET-I.png``; set -> paths relative to ``root``."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[str, ...]] = {}
    for label, pixels in sets.items():
        unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        files = []
        for i, array in enumerate((unit * 255).round().astype(np.uint8)):
            Image.fromarray(array).save(folder / f"{label}-{i}.png")
            files.append(f"{name}/{label}-{i}.png")
        found[label] = tuple(files)
    return found


def write_index(root: Path, *, users: Sequence[PictureUser], attribution: str = "") -> Path:
    """Write ``pictures.json`` once all files are there."""
    record = {
        "version": VERSION,
        "attribution": attribution,
        "users": [
            {
                "user_id": user.user_id,
                "liked": list(user.liked),
                "disliked": list(user.disliked),
                "prompts": list(user.prompts),
                "pictures": {name: list(files) for name, files in user.pictures.items()},
                "note": user.note,
            }
            for user in users
        ],
    }
    path = root / INDEX
    write_json(path, content=record, ensure_ascii=False)
    return path


def read_picture_folder(root: Path) -> PictureFolder:
    """Read ``pictures.json`` and check that every file is there.

    Raises:
        DataError: no index, another version, a file that is missing or lies elsewhere, or numbers of prompts
            and pictures that differ.
    """
    path = root / INDEX
    if not path.is_file():
        raise DataError(
            f"no {INDEX} at {root}; 'prefgen evaluate extra.save_pictures=true' writes it into OUT/pictures"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        users = tuple(_user(one, root=root) for one in record["users"])
        version, attribution = record["version"], str(record.get("attribution", ""))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no picture index ({type(error).__name__} {error})") from None
    if version != VERSION:
        raise DataError(f"{path} has version {version}; this prefgen reads {VERSION}")
    if not users:
        raise DataError(f"{path} names no users")
    return PictureFolder(root=root, users=users, attribution=attribution)


def _user(record: Mapping[str, Any], *, root: Path) -> PictureUser:
    user = PictureUser(
        user_id=str(record["user_id"]),
        liked=tuple(str(name) for name in record["liked"]),
        disliked=tuple(str(name) for name in record["disliked"]),
        prompts=tuple(str(prompt) for prompt in record["prompts"]),
        pictures={str(k): tuple(str(name) for name in v) for k, v in record["pictures"].items()},
        note=str(record.get("note", "")),
    )
    for name, files in user.pictures.items():
        if len(files) != len(user.prompts):
            raise DataError(
                f"{root / INDEX}: user {user.user_id} has {len(user.prompts)} prompts and {len(files)} "
                f"pictures of {name}"
            )
    everything = [*user.liked, *user.disliked, *(file for files in user.pictures.values() for file in files)]
    for name in everything:
        place = root / name
        if not is_inside(place, root=root) or not place.is_file():
            raise DataError(f"{root / INDEX}: no file {name} in this folder")
    return user
