"""Several gloo ranks train as one process does, and end together."""

import pytest

from prefgen.testing.ranks import compare_ranks, train_ranks
from prefgen.testing.resume import assert_same
from prefgen.testing.study import save_tiny_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_tiny_workdir(tmp_path_factory.mktemp("ranks"), num_users=48)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stage", ["vqa", "probe", "align", "inject"])
def test_ranks_train_as_one_process_does(stage, strategy, world_size, workdir, tmp_path):
    found = compare_ranks(
        stage, workdir=workdir, folder=tmp_path, world_size=world_size, strategy=strategy, steps=6
    )
    print(stage, strategy, world_size, found)
    assert found.loss_difference < 1e-4 * max(1.0, abs(found.losses[0]))
    assert found.weight_moved > 0
    assert found.weight_difference < 0.02 * found.weight_moved + 1e-6
    own = {
        n: gap for n, gap in found.metric_differences.items() if n != "val/loss_other"
    }  # depends on batches
    assert max(own.values()) < 2e-3, own


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_go_on_exactly(strategy, workdir, tmp_path):
    """Three steps and three more are six, moving average and optimizer included."""
    common = {"workdir": workdir, "world_size": 2, "strategy": strategy, "every": 3}
    straight = train_ranks("align", run_dir=tmp_path / "straight", steps=6, **common)
    assert train_ranks("align", run_dir=tmp_path / "stopped", steps=3, **common)["global_step"] == 3
    resumed = train_ranks("align", run_dir=tmp_path / "stopped", steps=6, **common)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert_same(straight[part], resumed[part], where=part)
