"""scikit-learn's answers stand in tests/evaluate/test_parity.py, which needs it."""

import pytest
import torch

from prefgen.models import probe_solvers
from prefgen.models.probe_solvers import RidgeSums, fit_logistic, solve_grid
from prefgen.models.probes import ProbeGrid


def planted(*, count=300, cells=3, dim=6, classes=3, seed=0):
    """The last cell says the class, the others nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    features = torch.randn(count, cells, dim, generator=generator)
    features[:, -1, :classes] += 2.5 * torch.nn.functional.one_hot(labels, classes)
    return features, labels


def accuracy(grid, features, labels):
    return (grid(features).argmax(-1) == labels[:, None]).float().mean(0)


def test_ridge_is_the_least_squares_of_the_penalised_system():
    features, labels = planted(count=50, cells=2)
    sums = RidgeSums(num_cells=2, dim=6, num_classes=3)
    for start in range(0, 50, 7):
        sums.add(features[start : start + 7], labels=labels[start : start + 7, None].expand(-1, 2))
    found = sums.solve(l2=0.2)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    for cell in range(2):
        rows = features[:, cell].double()
        centred, wanted = rows - rows.mean(0), targets - targets.mean(0)
        penalty = (0.2 * 50) ** 0.5 * torch.eye(6, dtype=torch.float64)
        padded = torch.cat([wanted, torch.zeros(6, 3, dtype=torch.float64)])
        weight = torch.linalg.lstsq(torch.cat([centred, penalty]), padded).solution.T
        torch.testing.assert_close(found.weight[cell], weight)
        torch.testing.assert_close(found.bias[cell], targets.mean(0) - weight @ rows.mean(0))


def test_the_sums_do_not_grow_with_the_samples():
    sums = RidgeSums(num_cells=2, dim=6, num_classes=3)

    def kept():
        return sum(value.numel() for value in vars(sums).values() if isinstance(value, torch.Tensor))

    before = kept()
    features, labels = planted(count=500, cells=2)
    sums.add(features, labels=labels[:, None].expand(-1, 2))
    assert kept() == before
    assert sums.count == 500


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_has_no_gradient_left_and_no_lower_loss_nearby(classes):
    features, labels = planted(count=120, classes=classes)
    rows, l2 = features[:, -1].double(), 0.01
    found = fit_logistic(rows, labels=labels, num_classes=classes, l2=l2)
    weight, bias = found.weight[0].requires_grad_(), found.bias[0].requires_grad_()

    def loss(weight, bias):
        return (
            torch.nn.functional.cross_entropy(rows @ weight.T + bias, labels) + l2 / 2 * weight.pow(2).sum()
        )

    at = loss(weight, bias)
    at.backward()
    assert weight.grad.abs().max() < 1e-6
    assert bias.grad.abs().max() < 1e-6
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        step = 1e-2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        assert loss(weight.detach() + step, bias.detach()) > at


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_readable_cell_is_read_and_noise_is_not(kind):
    features, labels = planted(count=600)
    grid = solve_grid(kind, features[:400].half(), labels=labels[:400], num_classes=3, l2=0.01)
    right = accuracy(grid, features[400:], labels[400:])
    assert right[2] > 0.85
    assert (right[:2] < 0.45).all()


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_cells_are_solved_alone_in_whatever_portions_and_with_labels_of_their_own(kind, monkeypatch):
    features, labels = planted(count=80)
    features[:, 1, 2] = 4.0  # a coordinate that never moves
    own = torch.stack([labels, labels.flip(0), labels], dim=1)
    whole = solve_grid(kind, features, labels=own, num_classes=3, l2=0.05)
    monkeypatch.setattr(probe_solvers, "MOST_BYTES", 1)
    monkeypatch.setattr(probe_solvers, "CHUNK", 9)
    for cell in range(3):
        alone = solve_grid(kind, features[:, cell : cell + 1], labels=own[:, cell], num_classes=3, l2=0.05)
        torch.testing.assert_close(alone.weight[0], whole.weight[cell], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.bias[0], whole.bias[cell], atol=1e-5, rtol=1e-4)
    assert torch.isfinite(whole.weight).all()


def test_adamw_comes_to_where_the_logistic_probe_stands():
    """Trained long with as little decay as l2, the batched grid guesses the same on unseen samples."""
    features, labels = planted(count=600, seed=4)
    solved = solve_grid("logistic", features[:400], labels=labels[:400], num_classes=3, l2=1e-3)
    grid = ProbeGrid(num_cells=3, dim=6, num_classes=3, generator=torch.Generator().manual_seed(0))
    grid.set_statistics(features[:400])
    optimizer = torch.optim.AdamW(grid.parameters(), lr=0.05, weight_decay=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        grid.loss(features[:400], labels=labels[:400]).sum().backward()
        optimizer.step()
    same = (grid(features[400:]).argmax(-1) == solved(features[400:]).argmax(-1)).float().mean(0)
    assert (same > 0.95).all()


def test_a_probe_that_does_not_converge_says_so(monkeypatch, caplog):
    monkeypatch.setattr(probe_solvers, "_LBFGS_STEPS", 2)
    features, labels = planted(count=60)
    fit_logistic(features[:, -1], labels=labels, num_classes=3, l2=1e-6)
    assert "stopped at a gradient of" in caplog.text
