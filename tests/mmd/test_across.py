import pytest
import torch

from mmd.rank_cases import CASES, ddp_cases, make_model, make_rows, one_case
from prefgen.mmd import mmd2
from prefgen.mmd.bandwidth import mean_bandwidth
from prefgen.testing.distributed import run_distributed


@pytest.mark.dist
@pytest.mark.parametrize(("world", "dtype", "limit"), [(2, torch.float64, 1e-12), (4, torch.float32, 2e-6)])
def test_ddp_gradients_of_uneven_ranks_equal_one_process(world, dtype, limit):
    total = 13
    x, y = make_rows(dtype, total=total)
    model = make_model(dtype)
    expected = [one_case(model, x, y, case) for case in CASES]
    for outcome in run_distributed(ddp_cases, world, dtype, total, timeout=100):
        for (loss, grads), (want, want_grads) in zip(outcome["results"], expected, strict=True):
            assert abs(loss - want) <= limit * max(1.0, abs(want))
            scale = max(grad.abs().max() for grad in want_grads)
            for grad, want_grad in zip(grads, want_grads, strict=True):
                assert (grad - want_grad).abs().max() <= limit * scale
        assert outcome["sigma"] == pytest.approx(mean_bandwidth(x, y).item(), rel=1e-12)
        blocks = mmd2(x[:12], y[:12], estimator="block", block_size=3, bandwidth=1.0)
        assert outcome["blocks"] == pytest.approx(blocks.item(), rel=1e-5)
