"""Random access to the users of a split, by byte offset, with every member checked before it is believed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prefgen.data.images import MAX_IMAGE_BYTES, sniff
from prefgen.data.images import decode_image as decode_image
from prefgen.data.index import SampleEntry as SampleEntry
from prefgen.data.index import ShardEntry, ShardIndex, group_users, open_root, parse_json, read_index
from prefgen.data.remote import RemoteFolder
from prefgen.data.tarstore import ShardFiles, split_members
from prefgen.errors import DataError
from prefgen.schema import HISTORY_SUFFIX, SIDES, RatedImage, Side, Split, UserHistory, image_key

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 16 << 20
"""Most bytes of one sample's json."""

LOG_EVERY = 100
"""A skipped sample is logged at the first time and then at every LOG_EVERY-th."""

OnBad = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class UserSample:
    """One logical user: all parts merged.

    Attributes:
        key: key of the first part.
        user_id: the user.
        history: the judged images; ``RatedImage.image`` is the member name.
        liked: encoded liked images, in the order of ``history.liked``.
        disliked: encoded disliked images, in the order of ``history.disliked``.
        where: shard and key, for messages.
    """

    key: str
    user_id: str
    history: UserHistory
    liked: tuple[bytes, ...]
    disliked: tuple[bytes, ...]
    where: str = ""

    def side(self, name: Side) -> tuple[bytes, ...]:
        """Encoded images of one side."""
        return self.liked if name == "liked" else self.disliked

    def keys(self, name: Side) -> tuple[str, ...]:
        """Image keys of one side."""
        return tuple(image_key(self.user_id, name, i) for i in range(len(self.side(name))))

    def image_where(self, side: Side, *, position: int) -> str:
        """Shard, key and member of one image, for messages."""
        return f"{self.where}: member {self.history.side(side)[position].image}"


class SkipCounter:
    """Counts what was left out; the first is logged with its reason, then every ``LOG_EVERY``-th."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, error: DataError) -> None:
        """Count one skipped thing."""
        self.count += 1
        if self.count == 1 or self.count % LOG_EVERY == 0:
            logger.warning("skipped %d bad sample(s) so far; this one: %s", self.count, error)


class ShardReader:
    """The users of one split: ``len(reader)``, ``reader[i]``. Safe to fork and to pickle.

    Attributes:
        index: the whole folder's index.
        user_ids: by position.
        shard_sizes: users in each shard, in order: what a windowed shuffle needs.
        skipped: bad users met so far in this process (``on_bad="skip"``).
    """

    def __init__(
        self,
        root: Path | str | RemoteFolder,
        *,
        split: Split,
        on_bad: OnBad = "raise",
        max_image_bytes: int = MAX_IMAGE_BYTES,
    ) -> None:
        """Open.

        Args:
            root: folder with ``index.json``, here or in an object store.
            split: train, validation or test.
            on_bad: raise on a bad sample, or return ``None`` for it, count it and log it.
            max_image_bytes: most bytes of one encoded image.

        Raises:
            DataError: no index, another schema version, no such split, a URL or pipe.
        """
        self.root = open_root(root)
        self.split = split
        self.index: ShardIndex = read_index(self.root, kind="histories")
        shards = self.index.shards(split, where=self.root)
        users = [(shard, list(group_users(shard))) for shard in shards]
        self._groups = [(shard, group) for shard, groups in users for group in groups]
        self.user_ids = tuple(group[0].user_id for _, group in self._groups)
        self.shard_sizes = tuple(len(groups) for _, groups in users)
        self._on_bad = on_bad
        self._max_image_bytes = max_image_bytes
        self._files = ShardFiles(self.root)
        self._skips = SkipCounter()

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def skipped(self) -> int:
        """Bad users met so far in this process."""
        return self._skips.count

    def key(self, position: int) -> str:
        """Key of the first part of the user at a position, known even of a bad one."""
        return self._groups[position][1][0].key

    def __getitem__(self, position: int) -> UserSample | None:
        """The user at a position, or ``None`` where it is bad and ``on_bad="skip"``.

        Raises:
            DataError: bad sample and ``on_bad="raise"``; names shard, key and member.
            IndexError: position out of range.
        """
        try:
            return self.read(position)
        except DataError as error:
            if self._on_bad == "raise":
                raise
            self._skips.add(error)
            return None

    def read(self, position: int) -> UserSample:
        """The user at a position; a bad sample always raises DataError."""
        shard, group = self._groups[position]
        parts = [self._read_part(shard, entry=entry) for entry in group]
        first = parts[0]
        history = replace(
            first.history,
            liked=tuple(image for part in parts for image in part.history.liked),
            disliked=tuple(image for part in parts for image in part.history.disliked),
        )
        sample = replace(
            first,
            history=history,
            liked=tuple(data for part in parts for data in part.liked),
            disliked=tuple(data for part in parts for data in part.disliked),
        )
        for side in SIDES:
            _check_positions(history.side(side), side=side, where=sample.where)
        return sample

    def _read_part(self, shard: ShardEntry, *, entry: SampleEntry) -> UserSample:
        where = f"{self.root / shard.name}: sample {entry.key}"
        data = self._files.read(shard, sample=entry)
        members = split_members(data, key=entry.key, where=where, max_member_bytes=self._max_image_bytes)
        if HISTORY_SUFFIX not in members:
            raise DataError(f"{where}: member {entry.key}.{HISTORY_SUFFIX} is missing")
        record = parse_json(
            members.pop(HISTORY_SUFFIX), where=f"{where}: {HISTORY_SUFFIX}", max_bytes=MAX_JSON_BYTES
        )
        history = UserHistory.from_json(record, where=where)
        if history.user_id != entry.user_id:
            raise DataError(f"{where}: belongs to {history.user_id!r}, but the index says {entry.user_id!r}")
        if (len(history.liked), len(history.disliked)) != (entry.liked, entry.disliked):
            raise DataError(
                f"{where}: {len(history.liked)} liked and {len(history.disliked)} disliked images, "
                f"but the index says {entry.liked} and {entry.disliked}"
            )
        liked = _take(history.liked, members=members, where=where)
        disliked = _take(history.disliked, members=members, where=where)
        if members:
            raise DataError(f"{where}: member {min(members)!r} is not named by its history")
        return UserSample(
            key=entry.key,
            user_id=entry.user_id,
            history=history,
            liked=liked,
            disliked=disliked,
            where=where,
        )


def _take(images: tuple[RatedImage, ...], *, members: dict[str, bytes], where: str) -> tuple[bytes, ...]:
    found = []
    for image in images:
        data = members.pop(image.image, None)
        if data is None:
            raise DataError(f"{where}: member {image.image!r} is missing")
        if sniff(data) is None:
            raise DataError(f"{where}: member {image.image!r} is not a webp, jpeg or png image")
        found.append(data)
    return tuple(found)


def _check_positions(images: tuple[RatedImage, ...], *, side: Side, where: str) -> None:
    """Member names number a user's images through all parts; a gap means that a part is lost."""
    for position, image in enumerate(images):
        if not image.image.startswith(f"{side}.{position:03d}."):
            raise DataError(f"{where}: expected {side} image {position}, found member {image.image!r}")
