import pytest

from prefgen.testing.distributed import run_distributed


def add_up(rank, world_size, start):
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(start + rank)])
    dist.all_reduce(total)
    return total.item()


def fail_on_last(rank, world_size):
    if rank == world_size - 1:
        raise ValueError("rank had enough")
    return rank


@pytest.mark.dist
def test_ranks_talk_and_a_failing_one_is_named():
    assert run_distributed(add_up, 2, 10) == [21.0, 21.0]
    with pytest.raises(RuntimeError, match="rank 1 failed(.|\n)*rank had enough"):
        run_distributed(fail_on_last, 2, timeout=60)
