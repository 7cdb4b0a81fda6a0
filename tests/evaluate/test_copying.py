"""Distances to the nearest history image."""

import pytest
import torch

from prefgen.evaluate.copying import nearest_distances, nearest_to_each_other


def test_a_copy_has_distance_zero_and_the_own_history_counts():
    history = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    pictures = torch.stack([history[1], torch.full((3, 4, 4), 0.25), history[1]])
    histories = [history, history, history[2:]]
    found = nearest_distances(pictures, histories=histories, distance="pixels")
    assert found.tolist() == pytest.approx([0.0, 0.25, 1.0])


def test_embeddings_are_compared_by_angle():
    history = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pictures = torch.tensor([[5.0, 0.0], [-1.0, -1.0]])
    found = nearest_distances(pictures, histories=[history, history], distance="embedding")
    assert found.tolist() == pytest.approx([0.0, 1 + 0.5**0.5])


def test_within_a_history_an_image_is_not_its_own_neighbour():
    images = torch.tensor([[0.0], [0.5], [2.0]])
    assert nearest_to_each_other(images, distance="pixels").tolist() == pytest.approx([0.5, 0.5, 1.5])
