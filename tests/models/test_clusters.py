import pytest
import torch

from prefgen.errors import DataError
from prefgen.models.clusters import find_clusters, silhouette


def blobs(*sizes, spread=0.05, seed=0):
    """Rows around one direction a blob; which blob each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(64)[: len(sizes)]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=generator)
    labels = labels[order]
    noise = spread * torch.randn(len(labels), 64, generator=generator)
    length = 1 + torch.rand(len(labels), 1, generator=generator)  # CLIP's lengths mean nothing
    return length * (centres[labels] + noise), labels.tolist()


@pytest.mark.parametrize("sizes", [(6, 4), (5, 4, 3), (7, 5, 4, 2)])
def test_planted_tastes_are_found_and_counted(sizes):
    rows, truth = blobs(*sizes)
    found = find_clusters(rows, num_clusters=None)
    assert list(found.labels) == truth, "the largest comes first"
    assert found.count == len(sizes)
    assert found.silhouette > 0.5
    assert find_clusters(rows, num_clusters=len(sizes)) == found
    assert [len(found.rows(i)) for i in range(found.count)] == list(sizes)


@pytest.mark.parametrize("seed", range(5))
def test_one_taste_stays_one(seed):
    rows, _ = blobs(12, seed=seed)
    assert find_clusters(rows, num_clusters=None).labels == (0,) * 12


def test_one_odd_image_is_no_taste_unless_asked_for():
    rows, truth = blobs(6, 1)
    assert find_clusters(rows, num_clusters=None).count == 1
    assert list(find_clusters(rows, num_clusters=2).labels) == truth


def test_few_images():
    assert find_clusters(torch.ones(1, 64), num_clusters=None).labels == (0,)
    assert find_clusters(torch.ones(3, 64), num_clusters=None).labels == (0, 0, 0)
    each = find_clusters(torch.eye(3), num_clusters=3)
    assert sorted(each.labels) == [0, 1, 2]
    assert each.silhouette == 0.0


@pytest.mark.parametrize("count", [0, 3])
def test_more_tastes_than_different_images_are_refused(count):
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(
        DataError, match=f"3 images, 2 of them different, make from 1 to 2 tastes, got {count}"
    ):
        find_clusters(rows, num_clusters=count)


def test_the_seed_changes_no_names():
    rows, _ = blobs(5, 4, 3, spread=0.1)
    assert len({find_clusters(rows, num_clusters=3, seed=seed).labels for seed in range(5)}) == 1


def test_silhouette_by_hand():
    rows = torch.tensor([[0.0], [1.0], [5.0], [6.0], [20.0]]).double()
    labels = torch.tensor([0, 0, 1, 1, 2])
    # a = 1 each; b = 5.5, 4.5, 4.5, 5.5; the row alone counts 0.
    expected = ((5.5 - 1) / 5.5 + (4.5 - 1) / 4.5 + (4.5 - 1) / 4.5 + (5.5 - 1) / 5.5 + 0) / 5
    assert silhouette(rows, labels=labels) == pytest.approx(expected)
