"""Histories and their image files -> WebDataset shards: one user a sample, no user in two splits."""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from prefgen.data.images import MAX_IMAGE_BYTES, MAX_PIXELS, decode_image, encode_webp, sniff
from prefgen.data.index import ShardIndex, local_path, parse_json
from prefgen.data.reader import MAX_JSON_BYTES, OnBad
from prefgen.data.tarstore import ShardFolder
from prefgen.errors import DataError
from prefgen.schema import HISTORY_SUFFIX, RatedImage, Side, Split, UserHistory, image_member

logger = logging.getLogger(__name__)

DEFAULT_FRACTIONS = (0.9, 0.05, 0.05)
"""Share of train, validation and test among users whose history names no split."""


class Progress(Protocol):
    """What a builder reports to: one call per finished user."""

    def __call__(self, *, users: int, images: int) -> None:
        """``users`` and ``images`` finished so far."""


@dataclass(frozen=True, kw_only=True)
class BuildLimits:
    """What building accepts.

    Attributes:
        max_images_per_sample: a user with more becomes several samples.
        max_image_bytes: of one encoded file.
        max_pixels: of one image, checked before decoding.
        max_side: larger images are scaled down and encoded anew; 0 keeps every size.
    """

    max_images_per_sample: int = 64
    max_image_bytes: int = MAX_IMAGE_BYTES
    max_pixels: int = MAX_PIXELS
    max_side: int = 0


def count_histories(path: Path | str) -> int:
    """Lines of a history file that hold a user, without parsing them: for progress bars.

    Raises:
        DataError: missing file.
    """
    file = _history_file(path)
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def read_histories(path: Path | str) -> Iterator[UserHistory]:
    """Read ``history.jsonl`` line by line.

    Raises:
        DataError: missing file, a line over 16 MiB, bad json or a bad history; names file and line.
    """
    file = _history_file(path)
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_JSON_BYTES + 1):
            number += 1
            where = f"{file}:{number}"
            if len(line) > MAX_JSON_BYTES:
                raise DataError(f"{where}: line of over {MAX_JSON_BYTES:,} bytes")
            if line.strip():
                record = parse_json(line, where=where, max_bytes=MAX_JSON_BYTES)
                yield UserHistory.from_json(record, where=where)


def _history_file(path: Path | str) -> Path:
    file = local_path(path)
    if not file.is_file():
        raise DataError(f"no history file at {file}; pass --history FILE (one user a line, json)")
    return file


def assign_split(user_id: str, *, fractions: tuple[float, float, float] = DEFAULT_FRACTIONS) -> Split:
    """Split of a user whose history names none: a stable hash, so that adding users moves nobody.

    Args:
        user_id: the user.
        fractions: of train, validation and test; they sum to 1.

    Raises:
        DataError: the fractions are negative or do not sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"split fractions must be three numbers >= 0 that sum to 1, got {fractions}")
    digest = hashlib.sha256(f"split|{user_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < fractions[0]:
        return "train"
    return "validation" if place < fractions[0] + fractions[1] else "test"


def write_shards(
    histories: Iterable[UserHistory],
    *,
    root: Path | str,
    out: Path | str,
    users_per_shard: int = 64,
    max_images_per_sample: int = 64,
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
    on_bad: OnBad = "raise",
    limits: BuildLimits | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ShardIndex:
    """Build the shards of all splits in one pass and bounded memory.

    Webp, jpeg and png files keep their bytes; other formats become webp. Every image is decoded once, so that
    what the shards hold is known to be readable.

    Args:
        histories: users, in the order they shall have in the shards.
        root: folder the image paths are relative to; nothing outside it is read.
        out: folder for ``<split>-000000.tar`` .. and ``index.json``.
        users_per_shard: users in one tar file.
        max_images_per_sample: a user with more images becomes several samples.
        fractions: see :func:`assign_split`.
        on_bad: raise at the first bad image, or leave it out and count it in the index's ``dropped``. A user
            left without images is dropped and counted too. Two users with one id are always an error.
        limits: sizes accepted; default :class:`BuildLimits`.
        overwrite: replace an earlier set in ``out``.
        progress: called after each user.

    Raises:
        DataError: bad image or path (with ``on_bad="raise"``), two users with one id, no users at all.
    """
    limits = replace(limits or BuildLimits(), max_images_per_sample=max_images_per_sample)
    if max_images_per_sample < 2:
        raise DataError(f"max images per sample: expected at least 2, got {max_images_per_sample}")
    dropped: Counter[str] = Counter()
    loader = _ImageLoader(Path(root), limits=limits, on_bad=on_bad, dropped=dropped)
    users: set[str] = set()
    images = 0
    with ShardFolder(out, kind="histories", samples_per_shard=users_per_shard, overwrite=overwrite) as folder:
        for history in histories:
            if history.user_id in users:
                raise DataError(
                    f"two users with the id {history.user_id!r}; ids must be unique over all splits"
                )
            users.add(history.user_id)
            split = history.split or assign_split(history.user_id, fractions=fractions)
            parts = list(_parts(replace(history, split=split), loader=loader, limits=limits))
            if parts:
                folder.add_user(history.user_id, split=split, parts=parts)
            else:
                _drop(DataError(f"user {history.user_id}: no usable image"), "user without images", loader)
            images += sum(liked + disliked for _, liked, disliked in parts)
            if progress is not None:
                progress(users=len(users), images=images)
        if images == 0:
            raise DataError(f"no users with images to build shards from ({len(users)} histories read)")
        return folder.close(dropped=dropped)


Part = tuple[dict[str, bytes], int, int]


def _parts(history: UserHistory, *, loader: _ImageLoader, limits: BuildLimits) -> Iterator[Part]:
    """Samples of one user: members by suffix, number of liked and of disliked images."""
    liked = loader.load_side(history, side="liked")
    disliked = loader.load_side(history, side="disliked")
    total = len(liked) + len(disliked)
    count = -(-total // limits.max_images_per_sample)
    # Each part takes an even share of both sides, so that plain webdataset users meet no one-sided samples.
    while count and -(-len(liked) // count) + -(-len(disliked) // count) > limits.max_images_per_sample:
        count += 1
    for part in range(count):
        mine = [
            side[len(side) * part // count : len(side) * (part + 1) // count] for side in (liked, disliked)
        ]
        record = replace(
            history, liked=tuple(image for image, _ in mine[0]), disliked=tuple(image for image, _ in mine[1])
        ).to_json()
        members = {image.image: data for side in mine for image, data in side}
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        yield {HISTORY_SUFFIX: text.encode("utf-8"), **members}, len(mine[0]), len(mine[1])


def _drop(error: DataError, reason: str, loader: _ImageLoader) -> None:
    if loader.on_bad == "raise":
        raise error
    loader.dropped[reason] += 1
    if loader.dropped[reason] == 1 or loader.dropped[reason] % 100 == 0:
        logger.warning("left out (%s, %d so far): %s", reason, loader.dropped[reason], error)


class _ImageLoader:
    """Reads and checks the image files of histories."""

    def __init__(self, root: Path, *, limits: BuildLimits, on_bad: OnBad, dropped: Counter[str]) -> None:
        self.root = root
        self.limits = limits
        self.on_bad = on_bad
        self.dropped = dropped
        self._real_root = root.resolve()

    def load_side(self, history: UserHistory, *, side: Side) -> list[tuple[RatedImage, bytes]]:
        """Usable images with their bytes, renamed to their member names (positions count usable ones)."""
        loaded: list[tuple[RatedImage, bytes]] = []
        for position, image in enumerate(history.side(side)):
            where = f"user {history.user_id}: {side}[{position}] {image.image[:120]!r}"
            try:
                data, extension = self._load(image.image, where=where)
            except DataError as error:
                _drop(error, "bad image", self)
                continue
            name = image_member(side, len(loaded), extension=extension)
            loaded.append((replace(image, image=name), data))
        return loaded

    def _load(self, path: str, *, where: str) -> tuple[bytes, str]:
        data = self._read(path, where=where)
        extension = sniff(data)
        image = decode_image(
            data, where=where, max_pixels=self.limits.max_pixels, any_format=extension is None
        )
        too_large = 0 < self.limits.max_side < max(image.size)
        if extension is not None and not too_large:
            return data, extension
        if too_large:
            image.thumbnail((self.limits.max_side, self.limits.max_side))
        return encode_webp(image), "webp"

    def _read(self, path: str, *, where: str) -> bytes:
        parts = PurePosixPath(path).parts
        if ".." in parts or PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or "\\" in path:
            raise DataError(f"{where}: image path must be relative and stay inside {self.root}")
        if path.startswith("pipe:") or "://" in path:
            raise DataError(f"{where}: pipes and URLs are refused; give a file inside {self.root}")
        file = self.root / path
        try:
            if not file.resolve().is_relative_to(self._real_root):
                raise DataError(f"{where}: leads outside {self.root} through a link")
            status = file.stat()
            # A fifo would block forever, a device could feed bytes without end.
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{where}: not a regular file")
            if status.st_size > self.limits.max_image_bytes:
                raise DataError(
                    f"{where}: {status.st_size:,} bytes; at most {self.limits.max_image_bytes:,} are accepted"
                )
            return file.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{where}: cannot be read ({reason})") from None
