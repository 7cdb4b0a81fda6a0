import pytest
import torch

from prefgen.errors import DataError
from prefgen.evaluate.mmd_metric import MMDMetric
from prefgen.mmd import mmd2


def rows(count, seed):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_updates_add_up_and_reset_forgets():
    metric = MMDMetric(bandwidth="median")
    x, y = rows(11, 0), rows(7, 1) + 0.3
    metric.update(x=x[:5])
    metric.update(x=x[5:], y=y)
    assert metric.compute().item() == mmd2(x, y, bandwidth="median", estimator="unbiased").item()
    metric.reset()
    with pytest.raises(DataError, match="no rows of x yet"):
        metric.compute()


def test_unequal_sizes_and_equal_distributions_average_to_zero():
    values = []
    for seed in range(40):
        metric = MMDMetric(bandwidth=2.0)
        metric.update(x=rows(30, seed), y=rows(9, 1000 + seed))
        values.append(metric.compute().item())
    assert abs(sum(values) / len(values)) < 0.01


def test_states_of_two_metrics_merge():
    whole, half, other = (MMDMetric(bandwidth=1.0) for _ in range(3))
    x, y = rows(8, 0), rows(6, 1)
    whole.update(x=x, y=y)
    half.update(x=x[:3], y=y[:2])
    other.update(x=x[3:], y=y[2:])
    half.merge_state(other)
    assert half.compute().item() == pytest.approx(whole.compute().item(), abs=1e-6)


def test_a_vector_is_refused():
    with pytest.raises(DataError, match=r"must be \(n, D\)"):
        MMDMetric().update(x=torch.zeros(3))
