import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.data.transforms import resize_and_crop, stack_images, to_image, to_tensor
from prefgen.errors import DataError


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("range_", ["signed", "unit"])
def test_round_trip_is_exact(range_):
    image = noise(7, 5)
    values = to_tensor(image, range=range_)
    assert values.shape == (3, 5, 7)
    assert values.dtype == torch.float32
    assert values.min() >= (-1 if range_ == "signed" else 0)
    assert np.array_equal(np.asarray(to_image(values, range=range_)), np.asarray(image))


def test_known_values():
    image = Image.new("RGB", (1, 1), (255, 0, 51))
    assert torch.allclose(to_tensor(image).flatten(), torch.tensor([1.0, -1.0, -0.6]))
    assert torch.allclose(to_tensor(image, range="unit").flatten(), torch.tensor([1.0, 0.0, 0.2]))


@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "nearest"])
def test_crop_takes_the_middle(resample):
    image = Image.new("RGB", (90, 30), (0, 0, 0))
    image.paste((255, 255, 255), (30, 0, 60, 30))
    cropped = np.asarray(resize_and_crop(image, size=15, resample=resample))
    assert cropped.shape == (15, 15, 3)
    assert cropped.min() == 255  # box cropping first: no black bleeds in from outside the middle


def test_stack_and_refusals():
    assert stack_images([noise(9, 7), noise(4, 8)], size=4).shape == (2, 3, 4, 4)
    with pytest.raises(DataError, match="no pictures"):
        stack_images([], size=4)
    with pytest.raises(DataError, match=r"\(3, H, W\), got \(4, 2, 2\)"):
        to_image(torch.zeros(4, 2, 2))
    with pytest.raises(DataError, match="at least 1, got 0"):
        resize_and_crop(noise(3, 3), size=0)
