"""Paint one drawing under one value of every attribute group, true to its name.

``paint`` composes four steps on a 128-pixel canvas: the subject in its palette and rendering, the background,
the composition, the finish; the result is scaled to the wanted size. Every step is a plain function of PIL
images, found by the attribute's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from prefgen.data.agents.subjects import CANVAS, Layers
from prefgen.data.agents.world import ATTRIBUTE_GROUPS, GROUPS, attribute_names

RGB = tuple[int, int, int]
Ramp = tuple[RGB, RGB, RGB]

RAMPS: dict[str, Ramp] = {
    "crimson": ((88, 6, 18), (214, 32, 54), (255, 190, 196)),
    "orange": ((104, 38, 0), (246, 122, 16), (255, 216, 176)),
    "golden": ((108, 78, 0), (240, 186, 8), (255, 242, 186)),
    "lime": ((56, 80, 0), (154, 214, 28), (236, 255, 190)),
    "emerald": ((4, 52, 24), (24, 138, 66), (180, 232, 196)),
    "teal": ((0, 58, 60), (14, 164, 160), (184, 240, 236)),
    "sky blue": ((14, 66, 112), (74, 182, 248), (212, 240, 255)),
    "navy": ((6, 10, 58), (34, 58, 158), (184, 198, 246)),
    "violet": ((44, 8, 84), (134, 56, 216), (226, 202, 255)),
    "pink": ((108, 4, 64), (246, 62, 156), (255, 206, 232)),
    "brown": ((44, 22, 8), (140, 84, 42), (232, 206, 182)),
    "gray": ((22, 22, 22), (116, 116, 116), (230, 230, 230)),
}
"""Dark, middle and light tone of each palette."""


def paint(drawn: Layers, values: np.ndarray, *, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw one image.

    Args:
        drawn: layers of what to draw.
        values: one value index per group, shape (groups,).
        size: side of the result in pixels.
        rng: a little variety in place, size and slant, as between two drawings by one hand.

    Returns:
        RGB image, ``size`` x ``size``.
    """
    named = dict(zip(GROUPS, attribute_names(values), strict=True))
    sprite = RENDERINGS[named["rendering"]](drawn, RAMPS[named["palette"]])
    canvas = BACKGROUNDS[named["background"]]().convert("RGBA")
    for centre_x, centre_y, width, height, angle, mirrored in _places(named["composition"], rng):
        _place(canvas, sprite, (centre_x, centre_y), (width, height), angle=angle, mirrored=mirrored)
    finished = FINISHES[named["finish"]](canvas.convert("RGB"))
    return finished.resize((size, size), Image.Resampling.BOX)


# --- rendering: layers, ramp -> RGBA sprite -----------------------------------------------------------------


def _solid(mask: Image.Image, colour: RGB) -> Image.Image:
    image = Image.new("RGBA", mask.size, (*colour, 0))
    image.putalpha(mask)
    return image


@cache
def _ramp_table(ramp: Ramp, *, inverted: bool) -> tuple[list[int], list[int], list[int]]:
    at = np.linspace(0.0, 1.0, 256)
    at = 1.0 - at if inverted else at
    red, green, blue = (
        np.interp(at, (0.0, 0.5, 1.0), [tone[channel] for tone in ramp]).round().astype(int).tolist()
        for channel in range(3)
    )
    return red, green, blue


def _recoloured(drawn: Layers, ramp: Ramp, *, inverted: bool = False) -> Image.Image:
    """Original fills mapped by lightness onto the palette; the body behind them takes the light tone."""
    lightness = drawn.colour.convert("L")
    tables = _ramp_table(ramp, inverted=inverted)
    image = Image.merge("RGB", [lightness.point(table) for table in tables]).convert("RGBA")
    image.putalpha(drawn.colour.getchannel("A"))
    body = _solid(drawn.shape, ramp[0] if inverted else ramp[2])
    return Image.alpha_composite(body, image)


def _ink_outline(drawn: Layers, ramp: Ramp) -> Image.Image:
    return Image.alpha_composite(_recoloured(drawn, ramp), _solid(drawn.line, _darker(ramp[0])))


def _darker(colour: RGB) -> RGB:
    return (colour[0] // 3, colour[1] // 3, colour[2] // 3)


def _flat_shapes(drawn: Layers, ramp: Ramp) -> Image.Image:
    return _recoloured(replace(drawn, colour=drawn.flat), ramp)


def _line_art(drawn: Layers, ramp: Ramp) -> Image.Image:
    lines = drawn.line.filter(ImageFilter.MaxFilter(3))
    return Image.alpha_composite(_solid(drawn.shape, (255, 255, 255)), _solid(lines, ramp[1]))


def _silhouette(drawn: Layers, ramp: Ramp) -> Image.Image:
    return _solid(drawn.shape, ramp[1])


def _pixel_art(drawn: Layers, ramp: Ramp) -> Image.Image:
    cells = CANVAS // 8
    small = _ink_outline(drawn, ramp).resize((cells, cells), Image.Resampling.BOX)
    small.putalpha(small.getchannel("A").point(lambda value: 255 if value > 110 else 0))
    return small.resize((CANVAS, CANVAS), Image.Resampling.NEAREST)


@cache
def _dots(step: int, radius: float) -> Image.Image:
    grid_y, grid_x = np.mgrid[:CANVAS, :CANVAS] % step - (step - 1) / 2
    return Image.fromarray(((np.hypot(grid_x, grid_y) < radius) * 255).astype(np.uint8))


@cache
def _diagonals(step: int, width: int) -> Image.Image:
    grid_y, grid_x = np.mgrid[:CANVAS, :CANVAS]
    return Image.fromarray((((grid_x + grid_y) % step < width) * 255).astype(np.uint8))


def _textured(drawn: Layers, ramp: Ramp, texture: Image.Image) -> Image.Image:
    pattern = _solid(ImageChops.multiply(texture, drawn.shape), ramp[1])
    image = Image.alpha_composite(_solid(drawn.shape, ramp[2]), pattern)
    return Image.alpha_composite(image, _solid(drawn.line, _darker(ramp[0])))


def _halftone(drawn: Layers, ramp: Ramp) -> Image.Image:
    return _textured(drawn, ramp, _dots(16, 6.0))


def _hatching(drawn: Layers, ramp: Ramp) -> Image.Image:
    return _textured(drawn, ramp, _diagonals(16, 7))


@cache
def _fade() -> Image.Image:
    return Image.linear_gradient("L").resize((CANVAS, CANVAS))


def _gradient_fill(drawn: Layers, ramp: Ramp) -> Image.Image:
    bottom = _solid(drawn.shape, ramp[0])
    fade = Image.composite(bottom, _solid(drawn.shape, ramp[2]), _fade())
    fade.putalpha(drawn.shape)
    return Image.alpha_composite(fade, _solid(drawn.line, (255, 255, 255)))


def _neon_glow(drawn: Layers, ramp: Ramp) -> Image.Image:
    lines = drawn.line.filter(ImageFilter.MaxFilter(3))
    halo = drawn.shape.filter(ImageFilter.GaussianBlur(7)).point(lambda value: min(255, value * 2))
    image = Image.alpha_composite(_solid(halo, ramp[1]), _solid(drawn.shape, (12, 10, 24)))
    return Image.alpha_composite(image, _solid(lines, ramp[1]))


def _sticker(drawn: Layers, ramp: Ramp) -> Image.Image:
    rim = drawn.shape.filter(ImageFilter.MaxFilter(13))
    edge = rim.filter(ImageFilter.MaxFilter(5))
    image = Image.alpha_composite(_solid(edge, (150, 150, 150)), _solid(rim, (255, 255, 255)))
    return Image.alpha_composite(image, _ink_outline(drawn, ramp))


def _negative(drawn: Layers, ramp: Ramp) -> Image.Image:
    image = _recoloured(drawn, ramp, inverted=True)
    return Image.alpha_composite(image, _solid(drawn.line, ramp[2]))


def _block_shadow(drawn: Layers, ramp: Ramp) -> Image.Image:
    image = Image.new("RGBA", (CANVAS, CANVAS))
    shadow = _solid(drawn.shape, ramp[0])
    for shift in range(12, 0, -2):
        image.alpha_composite(shadow.crop((0, 0, CANVAS - shift, CANVAS - shift)), (shift, shift))
    return Image.alpha_composite(image, _recoloured(drawn, (ramp[1], ramp[1], ramp[2])))


RENDERINGS: dict[str, Callable[[Layers, Ramp], Image.Image]] = {
    "ink outline": _ink_outline,
    "flat shapes": _flat_shapes,
    "line art": _line_art,
    "silhouette": _silhouette,
    "pixel art": _pixel_art,
    "halftone": _halftone,
    "hatching": _hatching,
    "gradient fill": _gradient_fill,
    "neon glow": _neon_glow,
    "sticker": _sticker,
    "negative": _negative,
    "block shadow": _block_shadow,
}


# --- composition --------------------------------------------------------------------------------------------

Place = tuple[float, float, float, float, float, bool]
"""Centre x and y, width and height (parts of the canvas), angle in degrees, mirrored."""

PLACES: dict[str, tuple[Place, ...]] = {
    "centered": ((0.5, 0.5, 0.76, 0.76, 0, False),),
    "tiny": ((0.5, 0.5, 0.34, 0.34, 0, False),),
    "close-up": ((0.5, 0.52, 1.34, 1.34, 0, False),),
    "upside down": ((0.5, 0.5, 0.76, 0.76, 180, False),),
    "tilted": ((0.5, 0.5, 0.74, 0.74, 42, False),),
    "top left": ((0.31, 0.31, 0.5, 0.5, 0, False),),
    "bottom right": ((0.69, 0.69, 0.5, 0.5, 0, False),),
    "twins": ((0.28, 0.5, 0.46, 0.46, 0, False), (0.72, 0.5, 0.46, 0.46, 0, True)),
    "four copies": tuple((x, y, 0.4, 0.4, 0.0, False) for y in (0.29, 0.71) for x in (0.29, 0.71)),
    "row of three": tuple((x, 0.5, 0.31, 0.31, 0.0, False) for x in (0.2, 0.5, 0.8)),
    "tall": ((0.5, 0.5, 0.42, 0.92, 0, False),),
    "wide": ((0.5, 0.5, 0.92, 0.42, 0, False),),
}


def _places(name: str, rng: np.random.Generator) -> list[Place]:
    shift_x, shift_y = rng.uniform(-0.02, 0.02, 2)
    grow, slant = rng.uniform(0.96, 1.04), rng.uniform(-4, 4)
    return [
        (x + shift_x, y + shift_y, width * grow, height * grow, angle + slant, mirrored)
        for x, y, width, height, angle, mirrored in PLACES[name]
    ]


def _place(
    canvas: Image.Image,
    sprite: Image.Image,
    centre: tuple[float, float],
    size: tuple[float, float],
    *,
    angle: float,
    mirrored: bool,
) -> None:
    source = ImageOps.mirror(sprite) if mirrored else sprite
    scaled = source.resize(
        (round(size[0] * CANVAS), round(size[1] * CANVAS)), Image.Resampling.BILINEAR, reducing_gap=2.0
    )
    turned = scaled.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    left = round(centre[0] * CANVAS - turned.width / 2)
    top = round(centre[1] * CANVAS - turned.height / 2)
    box = (max(0, -left), max(0, -top), min(turned.width, CANVAS - left), min(turned.height, CANVAS - top))
    canvas.alpha_composite(turned.crop(box), (max(0, left), max(0, top)))


# --- background ---------------------------------------------------------------------------------------------


def _flat(colour: RGB) -> Image.Image:
    return Image.new("RGB", (CANVAS, CANVAS), colour)


def _pattern(mask: np.ndarray, ink: RGB, paper: RGB) -> Image.Image:
    return Image.composite(_flat(ink), _flat(paper), Image.fromarray((mask * 255).astype(np.uint8)))


def _grid() -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[:CANVAS, :CANVAS]
    return rows, columns


@cache
def _checkerboard() -> Image.Image:
    rows, columns = _grid()
    return _pattern((rows // 16 + columns // 16) % 2 == 0, (176, 176, 184), (248, 248, 248))


@cache
def _polka_dots() -> Image.Image:
    rows, columns = _grid()
    near = np.hypot(rows % 32 - 15.5, columns % 32 - 15.5) < 8
    far = np.hypot((rows + 16) % 32 - 15.5, (columns + 16) % 32 - 15.5) < 8
    return _pattern(near | far, (236, 160, 150), (255, 246, 232))


@cache
def _stripes() -> Image.Image:
    return _pattern(_grid()[1] % 24 < 12, (186, 206, 190), (246, 250, 244))


@cache
def _sunburst() -> Image.Image:
    rows, columns = _grid()
    angle = np.arctan2(rows - 63.5, columns - 63.5) + np.pi
    return _pattern((angle / (2 * np.pi) * 24).astype(int) % 2 == 0, (250, 206, 120), (255, 244, 208))


@cache
def _grid_paper() -> Image.Image:
    rows, columns = _grid()
    return _pattern((rows % 18 < 3) | (columns % 18 < 3), (150, 186, 224), (250, 252, 255))


@cache
def _brick_wall() -> Image.Image:
    rows, columns = _grid()
    shifted = (columns + (rows // 16) % 2 * 16) % 32
    return _pattern((rows % 16 < 3) | (shifted < 3), (226, 212, 200), (178, 92, 70))


@cache
def _ocean_waves() -> Image.Image:
    rows, columns = _grid()
    level = np.floor((rows + 5 * np.sin(columns * 2 * np.pi / 32)) / 21)
    low, high = np.array((190.0, 230, 250)), np.array((20.0, 84, 150))
    share = np.clip(level / 6, 0, 1)[..., None]
    return Image.fromarray((low * (1 - share) + high * share).round().astype(np.uint8))


@cache
def _grassy_hill() -> Image.Image:
    image = _flat((196, 230, 252))
    draw = ImageDraw.Draw(image)
    draw.ellipse((-60, 68, 190, 300), fill=(104, 178, 84))
    for x, y, radius in ((24, 24, 9), (36, 20, 11), (48, 25, 8), (98, 34, 8), (108, 30, 9)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))
    return image


@cache
def _starry_sky() -> Image.Image:
    image = _flat((16, 20, 64))
    draw = ImageDraw.Draw(image)
    spots = np.random.default_rng(5).uniform(4, CANVAS - 4, (34, 2))
    for i, (x, y) in enumerate(spots):
        radius = 3 if i % 3 == 0 else 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 244, 190))
    return image


@cache
def _city_skyline() -> Image.Image:
    image = _flat((244, 208, 186))
    draw = ImageDraw.Draw(image)
    for i, top in enumerate((58, 34, 70, 46, 22, 62, 40, 54)):
        draw.rectangle((i * 16, top, i * 16 + 15, CANVAS), fill=((96, 92, 116), (122, 116, 140))[i % 2])
        for y in range(top + 6, CANVAS - 6, 14):
            draw.rectangle((i * 16 + 5, y, i * 16 + 10, y + 5), fill=(250, 224, 140))
    return image


BACKGROUNDS: dict[str, Callable[[], Image.Image]] = {
    "plain white": lambda: _flat((255, 255, 255)),
    "plain black": lambda: _flat((0, 0, 0)),
    "checkerboard": _checkerboard,
    "polka dots": _polka_dots,
    "stripes": _stripes,
    "sunburst": _sunburst,
    "grid paper": _grid_paper,
    "brick wall": _brick_wall,
    "ocean waves": _ocean_waves,
    "grassy hill": _grassy_hill,
    "starry sky": _starry_sky,
    "city skyline": _city_skyline,
}


# --- finish -------------------------------------------------------------------------------------------------


def _boxes(image: Image.Image, boxes: list[tuple[int, int, int, int]], colour: RGB) -> Image.Image:
    draw = ImageDraw.Draw(image)
    for box in boxes:
        draw.rectangle(box, fill=colour)
    return image


def _frame(image: Image.Image, width: int, colour: RGB) -> Image.Image:
    ImageDraw.Draw(image).rectangle((0, 0, CANVAS - 1, CANVAS - 1), outline=colour, width=width)
    return image


def _polaroid(image: Image.Image) -> Image.Image:
    page = _flat((250, 248, 240))
    page.paste(image.resize((108, 100), Image.Resampling.BILINEAR), (10, 8))
    _frame(page, 2, (150, 146, 138))
    return page


def _letterbox(image: Image.Image) -> Image.Image:
    return _boxes(image, [(0, 0, CANVAS, 21), (0, CANVAS - 22, CANVAS, CANVAS)], (0, 0, 0))


@cache
def _vignette_mask() -> Image.Image:
    rows, columns = _grid()
    distance = np.hypot(rows - 63.5, columns - 63.5) / 90
    return Image.fromarray((np.clip(distance * 2.1 - 0.85, 0, 1) * 245).astype(np.uint8))


def _vignette(image: Image.Image) -> Image.Image:
    return Image.composite(_flat((40, 20, 10)), image, _vignette_mask())


@cache
def _disc() -> Image.Image:
    rows, columns = _grid()
    return Image.fromarray(((np.hypot(rows - 63.5, columns - 63.5) < 60) * 255).astype(np.uint8))


def _round_crop(image: Image.Image) -> Image.Image:
    return Image.composite(image, _flat((232, 226, 255)), _disc())


def _stamp_edge(image: Image.Image) -> Image.Image:
    page = _flat((250, 250, 250))
    page.paste(image.resize((100, 100), Image.Resampling.BILINEAR), (14, 14))
    draw = ImageDraw.Draw(page)
    for step in range(0, CANVAS + 1, 16):
        for x, y in ((step, 0), (step, CANVAS), (0, step), (CANVAS, step)):
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=(96, 110, 128))
    return page


def _film_strip(image: Image.Image) -> Image.Image:
    _boxes(image, [(0, 0, 21, CANVAS), (CANVAS - 22, 0, CANVAS, CANVAS)], (18, 18, 18))
    holes = [(x, y, x + 9, y + 9) for y in range(5, CANVAS, 20) for x in (6, CANVAS - 16)]
    return _boxes(image, holes, (240, 240, 240))


def _dashed_border(image: Image.Image) -> Image.Image:
    dashes = []
    for at in range(6, CANVAS - 14, 24):
        dashes += [(at, 5, at + 13, 12), (at, CANVAS - 13, at + 13, CANVAS - 6)]
        dashes += [(5, at, 12, at + 13), (CANVAS - 13, at, CANVAS - 6, at + 13)]
    return _boxes(image, dashes, (230, 40, 40))


def _sparkles(image: Image.Image) -> Image.Image:
    draw = ImageDraw.Draw(image)
    for x, y, reach in ((20, 22, 17), (106, 28, 13), (26, 104, 13), (104, 102, 18), (66, 12, 10)):
        thin = reach // 4
        star = [(x, y - reach), (x + thin, y - thin), (x + reach, y), (x + thin, y + thin)]
        star += [(x, y + reach), (x - thin, y + thin), (x - reach, y), (x - thin, y - thin)]
        draw.polygon(star, fill=(255, 250, 130), outline=(224, 140, 0), width=2)
    return image


def _corner_ribbon(image: Image.Image) -> Image.Image:
    draw = ImageDraw.Draw(image)
    draw.polygon([(62, 0), (94, 0), (CANVAS, 34), (CANVAS, 66)], fill=(20, 160, 80))
    draw.line([(66, 2), (CANVAS, 64)], fill=(230, 255, 236), width=3)
    return image


def _soft_focus(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(3.5))


FINISHES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "clean edges": lambda image: image,
    "black frame": lambda image: _frame(image, 10, (0, 0, 0)),
    "polaroid": _polaroid,
    "letterbox": _letterbox,
    "vignette": _vignette,
    "round crop": _round_crop,
    "stamp edge": _stamp_edge,
    "film strip": _film_strip,
    "dashed border": _dashed_border,
    "sparkles": _sparkles,
    "corner ribbon": _corner_ribbon,
    "soft focus": _soft_focus,
}

for _group, _painters in (
    ("palette", RAMPS),
    ("rendering", RENDERINGS),
    ("background", BACKGROUNDS),
    ("composition", PLACES),
    ("finish", FINISHES),
):
    assert tuple(_painters) == ATTRIBUTE_GROUPS[_group], f"{_group}: painters and names differ"
