"""Aspect-ratio buckets: their sizes, and batches that hold one of them each."""

import numpy as np
import pytest

from prefgen.data.buckets import make_buckets, nearest_bucket
from prefgen.data.loader import ResumableLoader
from prefgen.data.order import full_batches, group_batches
from prefgen.errors import DataError
from prefgen.testing.data import NumberDataset, collate_numbers


def test_sizes_have_about_the_area_and_the_ratio_asked_for():
    buckets = make_buckets(size=(1024, 1024), step=64, max_ratio=2.0)
    assert (1024, 1024) in buckets
    assert (768, 1344) in buckets
    assert (640, 1600) not in buckets
    for height, width in buckets:
        assert height % 64 == width % 64 == 0
        assert 0.85 * 1024**2 < height * width <= 1024**2
        assert max(height, width) / min(height, width) <= 2
        assert (width, height) in buckets, "lying and standing alike"
    assert make_buckets(size=(512, 512), step=64, max_ratio=1.0) == ((512, 512),)


def test_a_picture_goes_to_the_shape_nearest_to_its_own():
    buckets = ((8, 16), (12, 12), (16, 8))
    sizes = [(100, 200), (100, 101), (300, 140), (10, 1000)]
    assert [nearest_bucket(size, buckets=buckets) for size in sizes] == [0, 1, 2, 0]


def test_batches_hold_one_group_and_fill_in_order():
    groups = np.array([0, 1, 0, 1, 1, 0, 0])
    order = [6, 1, 5, 4, 3, 2, 0]
    full = group_batches(order, groups=groups, batch_size=2, keep_rest=False)
    assert full == [[6, 5], [1, 4], [2, 0]]
    assert group_batches(order, groups=groups, batch_size=2, keep_rest=True) == [*full, [3]]


def test_as_many_batches_as_are_promised_always_fill():
    rng = np.random.default_rng(0)
    for _ in range(300):
        count, kinds, size = (int(rng.integers(1, high)) for high in (60, 6, 9))
        groups = rng.integers(0, kinds, count)
        order = rng.permutation(count)
        found = group_batches(order, groups=groups, batch_size=size, keep_rest=False)
        assert len(found) >= full_batches(count, num_groups=kinds, batch_size=size)


class GroupedNumbers(NumberDataset):
    """Numbers whose group changes with the epoch."""

    num_groups = 3

    def groups(self, *, epoch):
        return (np.arange(len(self)) * (epoch + 1)) % 3


def make_loader(**how):
    settings = {"batch_size": 2, "seed": 0, "shuffle": True, "drop_last": True, "num_workers": 0}
    return ResumableLoader(GroupedNumbers(20), collate_fn=collate_numbers, **settings | how)


def test_a_grouped_loader_has_one_length_and_resumes_anywhere():
    loader = make_loader()
    epochs = [[keys for keys, _ in loader] for _ in range(3)]
    assert {len(epoch) for epoch in epochs} == {len(loader)} == {9}
    for number, epoch in enumerate(epochs):
        groups = GroupedNumbers(20).groups(epoch=number)
        for keys in epoch:
            assert {key.split("@")[1] for key in keys} == {str(number)}
            assert len({int(groups[int(key.split("@")[0])]) for key in keys}) == 1
    again = make_loader()
    taken = [keys for keys, _ in again][:9]
    assert taken == epochs[0]
    iterator = iter(again)
    taken = [next(iterator)[0] for _ in range(4)]
    resumed = make_loader()
    resumed.load_state_dict(again.state_dict())
    assert taken + [keys for keys, _ in resumed] == epochs[1]


def test_evaluation_meets_everything_once():
    loader = make_loader(shuffle=False, drop_last=False)
    seen = [key for keys, _ in loader for key in keys]
    assert sorted(seen) == sorted(f"{number}@0" for number in range(20))
    assert len(list(loader)) == len(loader)


def test_too_few_for_certain_is_refused():
    with pytest.raises(DataError, match="in 3 groups fill no batch of 8 for certain"):
        make_loader(batch_size=8)
