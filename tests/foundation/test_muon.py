import pytest
import torch

from prefgen.foundation.muon import COEFFICIENTS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_singular_values_end_near_one_and_their_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 37
    found = orthogonal(matrix)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.mT @ found @ v.mT
    kept = s > 0.05 * s[0]
    assert turned.diagonal()[kept].min() > 0.65
    assert turned.diagonal()[kept].max() < 1.25
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(12, 108), (30, 7), (9, 9)])
def test_rounds_on_the_gram_matrix_are_the_rounds_on_the_matrix(shape):
    matrix = torch.randn((3, *shape), generator=torch.Generator().manual_seed(2))
    plain = matrix.double() / matrix.double().square().sum(dim=(-2, -1), keepdim=True).sqrt()
    for _ in range(5):
        linear, cubic, quintic = COEFFICIENTS
        square = plain @ plain.mT
        plain = linear * plain + (cubic * square + quintic * (square @ square)) @ plain
    torch.testing.assert_close(orthogonal(matrix).double(), plain, atol=2e-3, rtol=0)


def test_the_scale_of_the_gradient_is_left_out():
    matrix = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonal(matrix), orthogonal(matrix * 1000), atol=1e-4, rtol=0)


def test_a_step_has_the_size_of_adamws():
    """Root mean square of about 0.2 learning rates (arXiv 2502.16982), for convolutions as for matrices."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((32, 48), (16, 8, 3, 3)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator)
        Muon([parameter], lr=0.1, weight_decay=0.0).step()
        assert parameter.detach().square().mean().sqrt() == pytest.approx(0.02, rel=0.2)


def test_weight_decay_is_decoupled_and_a_parameter_without_gradient_stays():
    still, decayed = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    decayed.grad = torch.zeros(3, 3)
    Muon([still, decayed], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(3, 3))
    torch.testing.assert_close(decayed.detach(), torch.full((3, 3), 0.95))


def test_momentum_looks_ahead():
    """The second update is of g2 blended with the mean of both gradients (Nesterov)."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    muon = Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.9)
    first, second = torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    parameter.grad = first
    muon.step()
    before = parameter.detach().clone()
    parameter.grad = second
    muon.step()
    mean = 0.9 * (0.1 * first) + 0.1 * second
    expected = before - 0.2 * 2**0.5 * orthogonal(0.1 * second + 0.9 * mean)
    torch.testing.assert_close(parameter.detach(), expected)
