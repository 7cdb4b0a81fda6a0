import numpy as np
import pytest

from prefgen.data.budget import TokenBudget
from prefgen.data.loader import ResumableLoader
from prefgen.errors import CheckpointError, DataError


def length(position, epoch):
    return 10 + (position * 7 + epoch * 3) % 90


class Numbers:
    def __len__(self):
        return 100

    def example(self, index, *, epoch):
        return index, epoch


def budget(**changes):
    return TokenBudget(**{"length": length, "max_tokens": 400, "max_samples": 16, "seed": 0, **changes})


def loader(**changes):
    settings = {"batch_size": 16, "seed": 0, "shuffle": True, "drop_last": True, "num_workers": 0}
    settings |= {"budget": budget(), "collate_fn": list}
    return ResumableLoader(Numbers(), **{**settings, **changes})


def test_batches_stay_in_the_budget_and_waste_little():
    order = np.random.default_rng(0).permutation(1000).tolist()
    batches = budget()(order, epoch=1)
    assert sorted(one for batch in batches for one in batch) == list(range(1000))
    padded = [max(length(one, 1) for one in batch) * len(batch) for batch in batches]
    assert max(padded) <= 400
    assert max(len(batch) for batch in batches) <= 16
    assert sum(length(one, 1) for one in order) > 0.85 * sum(padded)
    assert len({len(batch) for batch in batches}) > 3
    assert budget()(order, epoch=1) == batches


def test_a_sample_over_the_budget_is_named():
    with pytest.raises(DataError, match="a sample has 5. tokens, but max_tokens=50"):
        budget(max_tokens=50)(range(100), epoch=0)


def test_a_loader_resumes_in_mid_epoch_and_in_another_epoch():
    whole = loader()
    straight = [batch for _ in range(3) for batch in whole]
    sizes = [len(list(loader_at(epoch))) for epoch in range(3)]
    assert len(straight) == sum(sizes)
    for stop in (3, sizes[0], sizes[0] + 5, sum(sizes) - 1):
        first = loader()
        got = []
        while len(got) < stop:
            for batch in first:
                got.append(batch)
                if len(got) == stop:
                    break
        second = loader()
        second.load_state_dict(first.state_dict())
        while len(got) < len(straight):
            got += list(second)
        assert got == straight
    with pytest.raises(CheckpointError, match="order"):
        loader(budget=budget(max_tokens=500)).load_state_dict(whole.state_dict())


def loader_at(epoch):
    one = loader()
    one.set_epoch(epoch)
    return one


def test_ranks_get_the_same_number_of_batches_and_no_sample_twice():
    parts = [list(loader(rank=rank, world_size=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    numbers = [index for part in parts for batch in part for index, _ in batch]
    assert len(set(numbers)) == len(numbers)
