import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from prefgen.data.images import accepted_formats, decode_cutout, decode_image, encode_webp, sniff
from prefgen.errors import DataError


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels to speak of."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", ihdr)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(9, 13, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "JPEG"])
def test_formats_of_shards(kind):
    data = encode(PICTURE, kind)
    assert sniff(data) == kind.lower()
    image = decode_image(data, where="here")
    assert (image.mode, image.size) == ("RGB", (13, 9))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_only_when_asked(kind):
    data = encode(PICTURE, kind)
    assert sniff(data) is None
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data, where="here")
    assert decode_image(data, where="here", any_format=True).size == (13, 9)


@pytest.mark.parametrize("side", [8000, 12_000, 60_000])
def test_bomb_is_refused_before_decoding(side):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="u1.liked.000.png: image .*at most .* are accepted"):
            decode_image(png_header(side, side), where="u1.liked.000.png")


def test_limit_is_exact():
    data = encode(PICTURE, "PNG")
    decode_image(data, where="here", max_pixels=13 * 9)
    with pytest.raises(DataError, match="13 x 9 pixels; at most 116 pixels"):
        decode_image(data, where="here", max_pixels=13 * 9 - 1)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "JPEG"])
def test_damage_is_an_error_of_one_line(kind):
    data = encode(PICTURE, kind)
    for broken in (b"", data[:4], data[: len(data) // 2], b"\x00" * 100, data[:20] + b"\xff" * len(data)):
        with pytest.raises(DataError, match="^here: ") as caught:
            decode_image(broken, where="here")
        assert "\n" not in str(caught.value)


def test_transparent_becomes_white():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(decode_image(encode(image, "PNG"), where="here")).min() == 255
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    data = encode(palette, "PNG", transparency=0)
    assert np.asarray(decode_image(data, where="here")).min() == 255


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    data = encode(Image.new(mode, (3, 3)), "JPEG" if mode == "CMYK" else "PNG")
    assert decode_image(data, where="here").mode == "RGB"


@pytest.mark.parametrize(("mode", "alpha"), [("RGBA", 7), ("LA", 7), ("RGB", 255), ("P", 255)])
def test_cutouts_keep_their_transparency(mode, alpha):
    colour = {"RGBA": (9, 8, 7, 7), "LA": (9, 7), "RGB": (9, 8, 7), "P": 0}[mode]
    image = decode_cutout(encode(Image.new(mode, (3, 3), colour), "PNG"), where="here")
    assert image.mode == "RGBA"
    assert image.getpixel((1, 1))[3] == alpha
    with pytest.raises(DataError, match="here: image of 9 x 9 pixels; at most 80"):
        decode_cutout(encode(Image.new("RGBA", (9, 9)), "PNG"), where="here", max_pixels=80)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, where="here").getpixel((0, 0)) == (255, 0, 0)


def test_webp_is_small_and_close():
    flat = Image.new("RGB", (32, 32), (200, 30, 30))
    assert len(encode_webp(flat)) < 300
    assert abs(np.asarray(decode_image(encode_webp(flat), where="x")).astype(int) - [200, 30, 30]).max() < 6


def test_formats_that_start_other_programs_are_not_decoded(tmp_path):
    """Pillow hands PostScript to Ghostscript."""
    picture = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for any_format in (False, True):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_image(picture, where="x", any_format=any_format)
    assert not {"EPS", "WMF", "PDF"} & set(accepted_formats(any_format=True))
