"""Plots as files and as pictures for TensorBoard, drawn once for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image


def save_figure(figure: Figure, *, path: Path) -> NDArray[np.uint8]:
    """Write a figure to ``path``.

    Returns:
        The picture (H, W, 3), as it is in the file.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    Image.fromarray(picture).save(path)
    return picture
