"""Image bytes -> a file named by their content, and what the image looks like in a few bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from prefgen.data.images import MAX_IMAGE_BYTES, accepted_formats, decode_image, sniff
from prefgen.data.sources.base import Unusable
from prefgen.errors import DataError
from prefgen.whole_file import whole_file

HASH_BITS = 64
MAX_COLOUR_DIFFERENCE = 12.0
"""Mean difference (0 to 255) of 4 x 4 thumbnails above which two images are different whatever their hash
says: the hash sees no colour, and a recoloured picture is another taste."""

_SIDE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What is known of an image.

    Attributes:
        sha256: of its bytes, as hex; empty when there are none.
        extension: of its file; empty when it is broken.
        size: bytes.
        phash: 64-bit perceptual hash, big endian.
        colours: 4 x 4 RGB thumbnail, 48 bytes.
        broken: why it cannot be used; empty when it can.
        detail: the whole message behind ``broken``.
    """

    sha256: str = ""
    extension: str = ""
    size: int = 0
    phash: bytes = b""
    colours: bytes = b""
    broken: str = ""
    detail: str = ""


def describe(data: bytes | Unusable) -> Described:
    """Decode an image once, so that what is kept is known to be readable."""
    if isinstance(data, Unusable):
        return Described(broken=data.reason, detail=f"image is {data.reason}")
    digest = hashlib.sha256(data).hexdigest()
    if len(data) > MAX_IMAGE_BYTES:
        return Described(sha256=digest, size=len(data), broken="too large", detail="image is too large")
    try:
        image = decode_image(data, where="image", any_format=True)
    except DataError as error:
        return Described(sha256=digest, size=len(data), broken="cannot be decoded", detail=str(error))
    return Described(
        sha256=digest,
        extension=sniff(data) or _other_extension(data),
        size=len(data),
        phash=perceptual_hash(image),
        colours=image.resize((4, 4), Image.Resampling.BOX).tobytes(),
    )


def _other_extension(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=accepted_formats(any_format=True)) as image:
        return (image.format or "img").lower()


def perceptual_hash(image: Image.Image) -> bytes:
    """64 bits that survive scaling and encoding: signs of the lowest frequencies against their median.

    Args:
        image: RGB.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_DCT @ grey @ _DCT.T)[_ROWS, _COLUMNS]
    return np.packbits(low > np.median(low)).tobytes()


def _lowest_frequencies() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    # Without (0, 0), the mean: its bit would be the same for every image.
    places = sorted((u + v, u, v) for u in range(12) for v in range(12))[1 : HASH_BITS + 1]
    return np.array([u for _, u, _ in places]), np.array([v for _, _, v in places])


_ROWS, _COLUMNS = _lowest_frequencies()
_DCT = np.cos(np.pi / _SIDE * (np.arange(_SIDE)[None] + 0.5) * np.arange(12)[:, None])


class NearIndex:
    """Images seen so far, found again by nearness without comparing all pairs.

    Hashes that differ in at most d of 64 bits agree whole in one of d + 1 bands (pigeonhole), so only images
    that share a band are compared.
    """

    def __init__(self, *, distance: int) -> None:
        edges = [HASH_BITS * band // (distance + 1) for band in range(distance + 2)]
        self._bands = [(HASH_BITS - stop, (1 << (stop - start)) - 1) for start, stop in _pairs(edges)]
        self._distance = distance
        self._found: list[tuple[int, npt.NDArray[np.int16]]] = []
        self._by_band: dict[tuple[int, int], list[int]] = {}

    def add(self, phash: bytes, *, colours: bytes) -> bool:
        """Whether an earlier image is near; if not, remember this one."""
        value = int.from_bytes(phash, "big")
        look = np.frombuffer(colours, dtype=np.uint8).astype(np.int16)
        keys = [(band, value >> shift & mask) for band, (shift, mask) in enumerate(self._bands)]
        for number in {n for key in keys for n in self._by_band.get(key, ())}:
            other, colour = self._found[number]
            near = (value ^ other).bit_count() <= self._distance
            if near and float(np.abs(look - colour).mean()) <= MAX_COLOUR_DIFFERENCE:
                return True
        for key in keys:
            self._by_band.setdefault(key, []).append(len(self._found))
        self._found.append((value, look))
        return False


def _pairs(edges: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(edges, edges[1:], strict=False)


def picture_path(sha256: str, *, extension: str) -> str:
    """Path of an image relative to the history file."""
    return f"images/{sha256[:2]}/{sha256}.{extension}"


def write_picture(data: bytes, *, described: Described, out: Path) -> None:
    """Write an image under its name, whole or not at all; one that is there already is left alone."""
    path = out / picture_path(described.sha256, extension=described.extension)
    if path.is_file() and path.stat().st_size == len(data):
        return
    with whole_file(path) as part:
        part.write_bytes(data)
