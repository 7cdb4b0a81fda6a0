"""What a history is, in memory and in files: one truth for writers and readers. Standard library only.

A line of ``history.jsonl`` is ``UserHistory.to_json()``; a shard sample holds the same object as
``KEY.history.json`` with its images beside it as ``KEY.liked.000.webp``, ``KEY.disliked.000.webp``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from prefgen.errors import DataError

SCHEMA_VERSION = 1
"""Version of history lines and of shards; a reader refuses any other."""

HISTORY_SUFFIX = "history.json"
SPLITS = ("train", "validation", "test")
SOURCES = ("agent", "human")

Side = Literal["liked", "disliked"]
SIDES: tuple[Side, Side] = ("liked", "disliked")
Split = Literal["train", "validation", "test"]
Source = Literal["agent", "human"]


@dataclass(frozen=True, kw_only=True)
class RatedImage:
    """One judged image.

    Attributes:
        image: path relative to the history file, or the member name inside a shard.
        prompt: what the image was made for, without any taste word; empty when unknown.
        attributes: visual attributes the image is known to show (simulated users only).
    """

    image: str
    prompt: str = ""
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UserHistory:
    """The judged images of one user. The two sides may differ in number; either may be empty."""

    user_id: str
    source: Source
    liked: tuple[RatedImage, ...] = ()
    disliked: tuple[RatedImage, ...] = ()
    liked_attributes: tuple[str, ...] = ()
    disliked_attributes: tuple[str, ...] = ()
    split: Split | None = None

    def side(self, name: Side) -> tuple[RatedImage, ...]:
        """The liked or the disliked images."""
        return self.liked if name == "liked" else self.disliked

    def to_json(self) -> dict[str, Any]:
        """Plain dict for ``json.dumps``; empty optional fields are left out."""
        record = asdict(self)
        record["liked"] = [_without_empty(image) for image in record["liked"]]
        record["disliked"] = [_without_empty(image) for image in record["disliked"]]
        if self.split is None:
            del record["split"]
        return record

    @staticmethod
    def from_json(record: object, *, where: str) -> UserHistory:
        """Check and build.

        Args:
            record: a parsed json value.
            where: file and line, or shard and key, for the error message.

        Raises:
            DataError: a field is missing, of the wrong type, unknown, or outside its allowed values.
        """
        fields = _object(record, where=where, allowed=_HISTORY_FIELDS)
        user_id = _text(fields.get("user_id"), name="user_id", where=where)
        if not user_id or len(user_id) > 128 or not user_id.isprintable() or "/" in user_id:
            raise DataError(
                f"{where}: user_id {user_id[:40]!r} must be 1 to 128 printable characters without '/'"
            )
        source = fields.get("source", "human")
        if source not in SOURCES:
            raise DataError(f"{where}: source {source!r} is not one of {', '.join(SOURCES)}")
        split = fields.get("split")
        if split is not None and split not in SPLITS:
            raise DataError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}")
        return UserHistory(
            user_id=user_id,
            source=cast(Source, source),
            liked=_images(fields.get("liked", []), name="liked", where=where),
            disliked=_images(fields.get("disliked", []), name="disliked", where=where),
            liked_attributes=_words(fields.get("liked_attributes", []), name="liked_attributes", where=where),
            disliked_attributes=_words(
                fields.get("disliked_attributes", []), name="disliked_attributes", where=where
            ),
            split=cast("Split | None", split),
        )


_HISTORY_FIELDS = frozenset(UserHistory.__dataclass_fields__)
_IMAGE_FIELDS = frozenset(RatedImage.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two images for one prompt, one chosen over the other."""

    prompt: str
    chosen: RatedImage
    rejected: RatedImage


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A simulated user: what it likes and dislikes, known exactly.

    Attributes:
        user_id: unique in its data set.
        liked_attributes: attribute names it is drawn to.
        disliked_attributes: attribute names it avoids.
        split: which split its history belongs to.
    """

    user_id: str
    liked_attributes: tuple[str, ...]
    disliked_attributes: tuple[str, ...]
    split: Split


def image_member(side: Side, position: int, *, extension: str = "webp") -> str:
    """Shard member suffix of one image, e.g. ``liked.003.webp``."""
    return f"{side}.{position:03d}.{extension}"


def image_key(user_id: str, side: Side, position: int) -> str:
    """Name of one image across files, e.g. ``u000017/liked.003``: position within the whole history."""
    return f"{user_id}/{side}.{position:03d}"


def _without_empty(image: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in image.items() if name == "image" or value}


def _object(value: object, *, where: str, allowed: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a json object, got {type(value).__name__}")
    unknown = sorted(set(value) - allowed)
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")
    return value


def _text(value: object, *, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be text, got {type(value).__name__}")
    return value


def _words(value: object, *, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be a list of text, got {type(value).__name__}")
    return tuple(_text(item, name=f"{name}[{i}]", where=where) for i, item in enumerate(value))


def _images(value: object, *, name: str, where: str) -> tuple[RatedImage, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be a list of images, got {type(value).__name__}")
    images = []
    for i, item in enumerate(value):
        here = f"{where}: {name}[{i}]"
        fields = _object(item, where=here, allowed=_IMAGE_FIELDS)
        path = _text(fields.get("image"), name="image", where=here)
        if not path or "\x00" in path:
            raise DataError(f"{here}: image must be a path relative to the history file, got {path!r}")
        images.append(
            RatedImage(
                image=path,
                prompt=_text(fields.get("prompt", ""), name="prompt", where=here),
                attributes=_words(fields.get("attributes", []), name="attributes", where=here),
            )
        )
    return tuple(images)
