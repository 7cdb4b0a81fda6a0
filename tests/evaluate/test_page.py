"""Pieces of the report: what they write is escaped, embedded and says nothing where there is nothing."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from prefgen.evaluate.page import PlotRow, interval, interval_plot, page, picture, strip, table


def embedded(markup):
    """The pictures inside some HTML."""
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', markup)
    ]


def test_pictures_lie_in_the_page_bit_for_bit():
    pixels = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    [shown] = embedded(picture(pixels / 127.5 - 1, label='a "fox" <b>'))
    assert (shown == pixels.permute(1, 2, 0).numpy()).all()
    assert "&quot;fox&quot; &lt;b&gt;" in picture(pixels / 127.5 - 1, label='a "fox" <b>')


def test_strips_break_after_four():
    pixels = torch.zeros(5, 3, 4, 4)
    [shown] = embedded(strip(pixels, label="x"))
    assert shown.shape == (4 + 2 + 4, 4 * 6 - 2, 3)
    assert strip(pixels[:0], label="x") == "–"


def test_numbers_and_dashes():
    assert interval({"mean": 0.81249, "low": 0.7, "high": 0.9}) == "0.812 [0.700, 0.900]"
    assert interval(None) == "–"
    assert table(["a"], rows=[]) == ""


def test_the_plot_colours_what_is_told_apart_from_the_middle():
    rows = [
        PlotRow(label="<up>", mean=0.8, low=0.7, high=0.9),
        PlotRow(label="open", mean=0.5, low=0.4, high=0.6),
        PlotRow(label="down", mean=0.2, low=0.1, high=0.3),
    ]
    plot = interval_plot(rows, middle=0.5, left="l", right="r")
    assert re.findall(r'r="5" fill="(#\w+)"', plot) == ["#14713a", "#5b6675", "#a8281e"]
    assert "&lt;up&gt;" in plot
    assert interval_plot([], middle=0.5, left="l", right="r") == ""


def test_the_page_is_whole():
    text = page("a <title>", body="<p>x</p>")
    assert text.startswith("<!DOCTYPE html>")
    assert "a &lt;title&gt;" in text
