"""One user's image files -> the samples of a shard, every image read, checked and decoded once."""

from __future__ import annotations

import json
import logging
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from prefgen.data.images import MAX_IMAGE_BYTES, MAX_PIXELS, decode_image, encode_webp, sniff
from prefgen.data.index import ShardEntry
from prefgen.data.reader import OnBad
from prefgen.data.tarstore import OpenShard, sample_key
from prefgen.errors import DataError
from prefgen.inside import is_inside
from prefgen.schema import HISTORY_SUFFIX, RatedImage, Side, UserHistory, image_member

logger = logging.getLogger(__name__)

SamplePart = tuple[dict[str, bytes], int, int]
"""Members by suffix, number of liked and of disliked images."""


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


def user_samples(history: UserHistory, *, loader: ImageLoader, limits: BuildLimits) -> Iterator[SamplePart]:
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


def drop(error: DataError, reason: str, loader: ImageLoader) -> None:
    """Raise, or count and log now and then, as ``loader.on_bad`` says."""
    if loader.on_bad == "raise":
        raise error
    loader.dropped[reason] += 1
    if loader.dropped[reason] == 1 or loader.dropped[reason] % 100 == 0:
        logger.warning("left out (%s, %d so far): %s", reason, loader.dropped[reason], error)


class ImageLoader:
    """Reads and checks the image files of histories."""

    def __init__(self, root: Path, *, limits: BuildLimits, on_bad: OnBad, dropped: Counter[str]) -> None:
        self.root = root
        self.limits = limits
        self.on_bad = on_bad
        self.dropped = dropped

    def load_side(self, history: UserHistory, *, side: Side) -> list[tuple[RatedImage, bytes]]:
        """Usable images with their bytes, renamed to their member names (positions count usable ones)."""
        loaded: list[tuple[RatedImage, bytes]] = []
        for position, image in enumerate(history.side(side)):
            where = f"user {history.user_id}: {side}[{position}] {image.image[:120]!r}"
            try:
                data, extension = self._load(image.image, where=where)
            except DataError as error:
                drop(error, "bad image", self)
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
            if not is_inside(file, root=self.root):
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


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """What one tar file is made from; travels to worker processes.

    Attributes:
        path: of the tar file.
        users: its users, in order; splits are final.
        root: folder that image paths are relative to.
        limits: sizes accepted.
        on_bad: raise at the first bad image, or leave it out and count it.
    """

    path: Path
    users: tuple[UserHistory, ...]
    root: Path
    limits: BuildLimits
    on_bad: OnBad


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What became of a :class:`PackJob`: its entry (None where no user had a usable image) and counts."""

    entry: ShardEntry | None
    dropped: dict[str, int]
    images: int


def pack(job: PackJob, *, done: Callable[[int], None] | None = None) -> Packed:
    """Write one tar file, whole or not at all.

    Args:
        job: what to write.
        done: called after each user with its number of images.

    Raises:
        DataError: a bad image or path, or a user without images, with ``on_bad="raise"``.
    """
    dropped: Counter[str] = Counter()
    loader = ImageLoader(job.root, limits=job.limits, on_bad=job.on_bad, dropped=dropped)
    shard: OpenShard | None = None
    total = 0
    try:
        for history in job.users:
            samples = list(user_samples(history, loader=loader, limits=job.limits))
            if not samples:
                drop(DataError(f"user {history.user_id}: no usable image"), "user without images", loader)
            elif shard is None:
                shard = OpenShard(job.path)
            for part, (members, liked, disliked) in enumerate(samples):
                assert shard is not None
                key = sample_key(history.user_id, part=part)
                shard.write(key, user_id=history.user_id, members=members, liked=liked, disliked=disliked)
            images = sum(liked + disliked for _, liked, disliked in samples)
            total += images
            if done is not None:
                done(images)
        entry = shard.close() if shard is not None else None
        shard = None
    finally:
        if shard is not None:
            shard.discard()
    return Packed(entry=entry, dropped=dict(dropped), images=total)
