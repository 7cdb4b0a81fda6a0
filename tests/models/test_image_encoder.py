import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.errors import DataError
from prefgen.models import image_encoder
from prefgen.models.image_encoder import ImageEncoder
from prefgen.testing.diffusion import TINY_IMAGE_DIM, save_tiny_pipeline


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return ImageEncoder.load(save_tiny_pipeline(tmp_path_factory.mktemp("encoder")) / "image_encoder")


def test_more_images_than_one_pass_takes(encoder, monkeypatch):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(5)]
    whole, sizes = encoder.embed(images), []
    forward = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda pixels: sizes.append(len(pixels)) or forward(pixels))
    monkeypatch.setattr(image_encoder, "BATCH_SIZE", 2)
    torch.testing.assert_close(encoder.embed(images), whole)
    assert sizes == [2, 2, 1]


def test_no_images_are_no_rows(encoder):
    assert encoder.embed([]).shape == (0, TINY_IMAGE_DIM)


def test_a_folder_without_an_encoder_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no CLIP image encoder at") as caught:
        ImageEncoder.load(tmp_path)
    assert "\n" not in str(caught.value)
