"""Image bytes from strangers: what format they are, how large they get, and whether they decode at all."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

from PIL import Image

from prefgen.errors import DataError

MAX_PIXELS = 32 << 20
"""Most pixels of one image (about 5,800 x 5,800): a small file above it is likely a bomb."""

MAX_IMAGE_BYTES = 64 << 20
"""Most bytes of one encoded image."""

FORMATS = {"webp": "WEBP", "jpeg": "JPEG", "png": "PNG"}
"""Encodings a shard may hold, by member extension."""

OTHER_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "QOI", "TIFF")
"""What builders also read. Pillow knows more, some of which start other programs (EPS runs Ghostscript)."""


def sniff(data: bytes) -> str | None:
    """Extension of an encoding that shards hold, by its first bytes; ``None`` for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return None


def accepted_formats(*, any_format: bool) -> list[str]:
    """Pillow's names of what is decoded, as far as this build of Pillow has them."""
    if not any_format:
        return list(FORMATS.values())
    Image.init()
    return [*FORMATS.values(), *(name for name in OTHER_FORMATS if name in Image.OPEN)]


def decode_image(
    data: bytes, *, where: str, max_pixels: int = MAX_PIXELS, any_format: bool = False
) -> Image.Image:
    """Decode to RGB. Transparent parts become white; of an animation the first frame is taken.

    Args:
        data: encoded image.
        where: shard, key and member for the message.
        max_pixels: width times height allowed, checked before any pixel is decoded.
        any_format: accept :data:`OTHER_FORMATS` too (builders do).

    Raises:
        DataError: not an accepted image, too large, or damaged.
    """
    return _decode(data, where=where, max_pixels=max_pixels, any_format=any_format, to=_to_rgb)


def decode_cutout(data: bytes, *, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to RGBA, transparency kept; arguments and errors as :func:`decode_image`."""
    return _decode(data, where=where, max_pixels=max_pixels, any_format=False, to=_to_rgba)


def _decode(
    data: bytes,
    *,
    where: str,
    max_pixels: int,
    any_format: bool,
    to: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its own limit; ours below is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=accepted_formats(any_format=any_format))
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"{where}: image of {width} x {height} pixels; at most {max_pixels:,} pixels are accepted"
            )
        image.load()
        return to(image)
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{where}: image bomb; at most {max_pixels:,} pixels are accepted") from None
    except (
        Exception
    ) as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
        reason = " ".join(str(error).split())[:120] if "BytesIO" not in str(error) else "unknown format"
        raise DataError(f"{where}: image of {len(data):,} bytes cannot be decoded ({reason})") from None


def picture_size(data: bytes, *, where: str) -> tuple[int, int]:
    """(height, width) from an image's header, without decoding it; errors as :func:`decode_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = Image.open(io.BytesIO(data), formats=list(FORMATS.values())).size
    except Exception:  # whatever Pillow's plugins raise: decode_image has the words for it
        image = decode_image(data, where=where)
        width, height = image.size
    return height, width


def encode_webp(image: Image.Image, *, quality: int = 92) -> bytes:
    """Webp bytes of an RGB image; quality 1 to 100."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # convert("RGB") alone would keep the hidden colour below transparent pixels, often black.
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    return image.convert("RGBA")
