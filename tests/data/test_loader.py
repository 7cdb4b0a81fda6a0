import logging
import os
import signal
import time

import pytest
import torch

from prefgen.data.index import SampleEntry, ShardEntry, ShardIndex, write_index
from prefgen.data.loader import ResumableLoader
from prefgen.data.reader import ShardReader
from prefgen.errors import CheckpointError, DataError
from prefgen.testing.data import NumberDataset, collate_numbers, make_shards


def make(size=12, *, dataset=None, **options):
    settings = {
        "batch_size": 2,
        "seed": 5,
        "shuffle": True,
        "drop_last": True,
        "num_workers": 0,
        "collate_fn": collate_numbers,
    }
    return ResumableLoader(NumberDataset(size) if dataset is None else dataset, **{**settings, **options})


def keys(loader):
    return [key for batch, _ in loader for key in batch]


def test_epoch_is_a_permutation_and_the_next_differs():
    loader = make(12)
    first, second = keys(loader), keys(loader)
    assert sorted(first) == sorted(f"{i}@0" for i in range(12))
    assert sorted(second) == sorted(f"{i}@1" for i in range(12))
    assert [key.split("@")[0] for key in first] != [key.split("@")[0] for key in second]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_stream(num_workers):
    alone, helped = make(10), make(10, num_workers=num_workers)
    for _ in range(2):
        assert keys(alone) == keys(helped)
    helped.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_counts_batches_handed_over_and_seeks(num_workers):
    loader = make(12, num_workers=num_workers)
    stream = iter(loader)
    for _ in range(4):
        next(stream)
    state = loader.state_dict()
    assert (state["epoch"], state["batches_done"]) == (0, 4)  # not the ones that workers have ahead
    rest = [batch for batch, _ in stream]
    fresh = make(12, num_workers=2 - num_workers)
    fresh.load_state_dict(state)
    assert [batch for batch, _ in fresh] == rest
    assert keys(fresh) == keys(loader)


def test_seeking_reads_no_earlier_sample():
    class Watched(NumberDataset):
        def __init__(self, size):
            super().__init__(size)
            self.read = []

        def example(self, index, *, epoch):
            self.read.append(index)
            return super().example(index, epoch=epoch)

    dataset = Watched(1000)
    loader = make(dataset=dataset)
    loader.load_state_dict({**loader.state_dict(), "batches_done": 490})
    keys(loader)
    assert len(dataset.read) == 20


def test_state_is_plain_and_end_of_epoch_goes_on_with_the_next():
    loader = make(6)
    keys(loader)
    state = loader.state_dict()
    assert {type(value) for value in state.values()} <= {int, str}
    fresh = make(6)
    fresh.load_state_dict(state)
    assert {key.split("@")[1] for key in keys(fresh)} == {"1"}


def test_iterating_draws_nothing_from_the_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = make(8, num_workers=2)
    keys(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "batch_size=2 and world_size=1"),
        ({"seed": 6}, "seed=5"),
        ({"drop_last": False}, "order="),
        ({"world_size": 2}, "batch_size=2 and world_size=1, but .*world_size=2"),
        ({"dataset": NumberDataset(13)}, "num_samples=12"),
    ],
)
def test_state_of_another_order_is_refused(change, named):
    state = make(12).state_dict()
    with pytest.raises(CheckpointError, match=named):
        make(12, **change).load_state_dict(state)


@pytest.mark.parametrize("state", [{"batches_done": 7}, {"epoch": -1}, {"epoch": None}, {"version": 9}])
def test_damaged_state_is_refused(state):
    loader = make(12)
    with pytest.raises(CheckpointError):
        loader.load_state_dict({**loader.state_dict(), **state})


def test_ranks_share_an_epoch():
    parts = [make(13, rank=rank, world_size=3) for rank in range(3)]
    assert {len(part) for part in parts} == {2}
    seen = [key for part in parts for key in keys(part)]
    assert len(set(seen)) == len(seen) == 12


def test_evaluation_sees_each_sample_once_and_the_same_epoch_each_time():
    options = {"shuffle": False, "drop_last": False, "batch_size": 4, "world_size": 2}
    parts = [make(11, rank=rank, **options) for rank in range(2)]
    for _ in range(2):
        assert [key for part in parts for key in keys(part)] == [f"{i}@0" for i in range(11)]
    next(iter(parts[0]))  # a sanity check that takes one batch
    assert keys(parts[0]) == [f"{i}@0" for i in range(5)]


def test_too_few_samples_shows_the_arithmetic():
    with pytest.raises(
        DataError, match=r"7 users cannot give 2 rank\(s\) a batch of 4 each \(2 x 4 = 8 needed\)"
    ):
        make(7, batch_size=4, world_size=2, name="users")
    with pytest.raises(DataError, match="lower the batch size to 3 or less"):
        make(7, batch_size=4, world_size=2)
    with pytest.raises(DataError, match="0 samples"):
        make(dataset=NumberDataset(0), shuffle=False, drop_last=False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_worker_is_one_line(num_workers):
    loader = make(dataset=NumberDataset(8, bad=frozenset({3})), num_workers=num_workers)
    with pytest.raises(DataError, match="^number 3 is bad$"):
        keys(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_samples_are_counted_over_workers(num_workers, caplog):
    dataset = NumberDataset(8, bad=frozenset({3}), missing=frozenset({5}))
    loader = make(dataset=dataset, num_workers=num_workers, on_bad="skip", batch_size=4)
    with caplog.at_level(logging.WARNING, logger="prefgen"):
        assert len(keys(loader)) == 6
        assert loader.skipped == 2
        keys(loader)
    assert loader.skipped == 4
    assert len(caplog.records) == 1
    all_bad = NumberDataset(4, bad=frozenset(range(4)))
    with pytest.raises(DataError, match="every sample of a batch was bad; the last: number"):
        keys(make(dataset=all_bad, on_bad="skip"))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_other_start_methods(context, tmp_path):
    loader = make(6, num_workers=1, multiprocessing_context=context)
    assert keys(loader) == keys(make(6))
    loader.close()


class Users:
    """As a stage reads: a reader inside the workers."""

    def __init__(self, reader):
        self.reader = reader
        self.shard_sizes = reader.shard_sizes

    def __len__(self):
        return len(self.reader)

    def example(self, index, *, epoch):
        return self.reader[index].user_id, torch.zeros(3)


def test_reader_opened_before_the_fork(tmp_path):
    reader = ShardReader(make_shards(tmp_path, num_users=24), split="train")
    assert reader[0] is not None  # a handle is open in this process
    loader = make(dataset=Users(reader), num_workers=2, window_shards=2)
    assert sorted(keys(loader)) == sorted(reader.user_ids)


def test_workers_outlive_a_signal_meant_for_the_trainer():
    loader = make(400, num_workers=1)
    stream = iter(loader)
    next(stream)
    worker = loader._loader._iterator._workers[0]
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert len(list(stream)) == 199
    loader.close()
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.parametrize("size", [13, 24, 29])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_meet_the_global_batches_of_one_process(size, drop_last):
    alone = [batch for batch, _ in make(size, batch_size=6, drop_last=drop_last)]
    parts = [make(size, rank=rank, world_size=3, drop_last=drop_last) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1  # or ranks would wait for each other for ever
    together = [sum((batch for batch, _ in step), []) for step in zip(*parts, strict=True)]
    full = size // 6
    assert together[:full] == alone[:full]
    seen = [key for batch in together for key in batch]
    assert len(seen) == len(set(seen))


def test_another_number_of_ranks_goes_on_with_the_same_global_batches():
    straight = [batch for batch, _ in make(24, batch_size=6)]
    two = [make(24, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    streams = [iter(loader) for loader in two]
    first = [next(streams[0])[0] + next(streams[1])[0] for _ in range(2)]
    three = [make(24, rank=rank, world_size=3) for rank in range(3)]
    for loader in three:
        loader.load_state_dict(two[1].state_dict())
    rest = [sum((batch for batch, _ in step), []) for step in zip(*three, strict=True)]
    assert first + rest == straight
    with pytest.raises(CheckpointError, match=r"batch_size=3 and world_size=2, but .*batch size x ranks = 4"):
        make(24, batch_size=2, rank=0, world_size=2).load_state_dict(two[0].state_dict())
    windows = {"dataset": NumberDataset(24, shard_sizes=(4,) * 6), "window_shards": 2}
    with pytest.raises(CheckpointError, match="exact resume needs the same batch_size"):
        make(**windows, world_size=2).load_state_dict(make(**windows, batch_size=4).state_dict())


class SlowNumbers(NumberDataset):
    """One sample keeps its reader waiting, or kills it."""

    def __init__(self, size, *, at, seconds):
        super().__init__(size)
        self.at, self.seconds = at, seconds

    def example(self, index, *, epoch):
        if index == self.at and self.seconds is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.at:
            time.sleep(self.seconds)
        return super().example(index, epoch=epoch)


def test_a_stuck_worker_is_named():
    loader = make(dataset=SlowNumbers(8, at=3, seconds=4), num_workers=1, shuffle=False, stall_seconds=1)
    with pytest.raises(DataError, match=r"no batch for 1 s: .*epoch 0, batch 1 \(samples number 2, 3\)"):
        keys(loader)
    loader.close()


def test_a_dead_worker_is_said():
    loader = make(dataset=SlowNumbers(8, at=3, seconds=None), num_workers=1, shuffle=False, stall_seconds=60)
    with pytest.raises(DataError, match="a loader process died .*lower loader.num_workers"):
        keys(loader)
    loader.close()


def test_a_stall_without_workers_is_said(caplog):
    loader = make(dataset=SlowNumbers(4, at=2, seconds=1.8), shuffle=False, stall_seconds=1)
    with caplog.at_level(logging.WARNING, logger="prefgen"):
        assert len(keys(loader)) == 4
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("no batch for 1 s (epoch 0, batch 1)")


@pytest.mark.parametrize("num_shards", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_seeking_to_the_end_of_a_large_epoch_costs_no_more_than_its_start(tmp_path, num_shards):
    """1,000 samples a shard behind a real index: the time to the first batch at 0 % and at 90 %."""
    entries = [
        SampleEntry(f"u{i:06d}", f"u{i:06d}", i % 1000 * 1024, 1024, 1, 1) for i in range(1000 * num_shards)
    ]
    shards = tuple(
        ShardEntry(f"train-{n:06d}.tar", "0" * 64, 1_024_000, tuple(entries[n * 1000 : (n + 1) * 1000]))
        for n in range(num_shards)
    )
    write_index(ShardIndex(kind="histories", splits={"train": shards}), out=tmp_path)
    reader = ShardReader(tmp_path, split="train")

    class Keys(NumberDataset):
        def example(self, index, *, epoch):
            return reader.key(index), torch.zeros(3)

    seconds = []
    for share in (0.0, 0.9):
        loader = make(dataset=Keys(len(reader)), batch_size=16)
        loader.load_state_dict({**loader.state_dict(), "batches_done": int(len(loader) * share)})
        start = time.perf_counter()
        next(iter(loader))
        seconds.append(time.perf_counter() - start)
    print(f"first batch after {seconds[0]:.3f} s at 0 % and {seconds[1]:.3f} s at 90 %")
    assert abs(seconds[1] - seconds[0]) < 2
