import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd.reference import reference_mmd2
from prefgen.errors import PrefgenError
from prefgen.mmd import DEFAULT_MULTIPLIERS, MMDError, cmmd, mmd, mmd2

KERNELS = ("gaussian", "laplacian", "rq", "imq", "energy")
ESTIMATORS = ("biased", "unbiased", "ustat")
quick = settings(max_examples=15, deadline=None)


def draw(n, m, width=5, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    y = 1.2 * torch.randn(m, width, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), y.to(dtype)


sizes = st.integers(2, 9)
seeds = st.integers(0, 1000)


@quick
@given(n=sizes, m=sizes, seed=seeds, kernel=st.sampled_from(KERNELS), estimator=st.sampled_from(ESTIMATORS),
       weighted=st.booleans(), tile=st.sampled_from((0, 1, 3, 8)))  # fmt: skip
def test_value_and_gradient_equal_the_double_loop(n, m, seed, kernel, estimator, weighted, tile):
    m = n if estimator == "ustat" else m
    x, y = draw(n, m, seed=seed)
    wx = wy = None
    if weighted and estimator != "ustat":
        wx, wy = torch.rand(n) + 0.1, torch.rand(m) + 0.1
    sigmas = [1.0] if kernel == "energy" else [2.0, 2**0.5, 0.3]
    x.requires_grad_()
    y.requires_grad_()
    value = mmd2(
        x, y, kernel=kernel, bandwidth=sigmas, alpha=1.5, estimator=estimator, wx=wx, wy=wy, tile=tile or None
    )
    value.backward()
    weights = {} if wx is None else {"wx": (wx / wx.sum()).numpy(), "wy": (wy / wy.sum()).numpy()}
    want, want_x, want_y = reference_mmd2(
        x.detach().numpy(),
        y.detach().numpy(),
        kernel=kernel,
        sigmas=sigmas,
        alpha=1.5,
        estimator=estimator,
        **weights,
    )
    tolerance = 1e-6 if weighted else 1e-11
    assert value.item() == pytest.approx(want, abs=tolerance)
    assert np.abs(x.grad.numpy() - want_x).max() <= tolerance
    assert np.abs(y.grad.numpy() - want_y).max() <= tolerance


@quick
@given(n=sizes, m=sizes, seed=seeds, estimator=st.sampled_from(("biased", "unbiased")))
def test_symmetry_translation_and_row_order(n, m, seed, estimator):
    x, y = draw(n, m, seed=seed)
    value = mmd2(x, y, bandwidth=1.3, estimator=estimator)
    shift = torch.full((5,), 7.5, dtype=x.dtype)
    assert mmd2(y, x, bandwidth=1.3, estimator=estimator).item() == pytest.approx(value.item(), abs=1e-12)
    assert mmd2(x + shift, y + shift, bandwidth=1.3, estimator=estimator).item() == pytest.approx(
        value.item(), abs=1e-12
    )
    assert mmd2(x.flip(0), y.roll(1, 0), bandwidth=1.3, estimator=estimator).item() == pytest.approx(
        value.item(), abs=1e-12
    )


@quick
@given(seed=seeds, kernel=st.sampled_from(KERNELS))
def test_a_duplicate_row_is_a_row_of_double_weight(seed, kernel):
    x, y = draw(4, 5, seed=seed)
    twice = torch.cat((x, x[:1]))
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0])
    options = {"kernel": kernel, "bandwidth": 1.1}
    assert mmd2(twice, y, **options).item() == pytest.approx(
        mmd2(x, y, wx=weights, **options).item(), abs=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [1, 8, 17, 60, None])
def test_the_tile_size_does_not_matter(dtype, tile):
    x, y = draw(17, 60, seed=3, dtype=dtype)
    options = {"bandwidth": "median"}
    whole = mmd2(x.double(), y.double(), bandwidth="median")
    assert mmd2(x, y, tile=tile, **options).item() == pytest.approx(
        whole.item(), rel=1e-5 if dtype == torch.float32 else 1e-10
    )


def test_unbiased_is_the_mean_over_all_pairs_of_half_samples():
    # U-statistic: the mean of the estimator over all subsets of size 2 of each side is the estimator itself.
    x, y = draw(4, 5, seed=8)
    parts = [
        mmd2(x[[i, j]], y[[k, h]], bandwidth=1.5, estimator="unbiased").item()
        for i in range(4) for j in range(i) for k in range(5) for h in range(k)
    ]  # fmt: skip
    assert mmd2(x, y, bandwidth=1.5, estimator="unbiased").item() == pytest.approx(np.mean(parts), abs=1e-12)


def test_block_and_linear_are_means_over_blocks():
    x, y = draw(12, 12, seed=2)
    for a in (x, y):
        a.requires_grad_()
    value = mmd2(x, y, bandwidth=1.2, estimator="block", block_size=4)
    parts = [mmd2(x[i : i + 4], y[i : i + 4], bandwidth=1.2, estimator="unbiased") for i in (0, 4, 8)]
    assert value.item() == pytest.approx(sum(parts).item() / 3, abs=1e-12)
    grads = torch.autograd.grad(value, (x, y)), torch.autograd.grad(sum(parts) / 3, (x, y))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    linear = mmd2(x[:11], y[:11], bandwidth=1.2, estimator="linear")
    pairs = [
        mmd2(x[i : i + 2], y[i : i + 2], bandwidth=1.2, estimator="ustat").item() for i in range(0, 10, 2)
    ]
    assert linear.item() == pytest.approx(np.mean(pairs), abs=1e-12)
    uneven = mmd2(x[:6], y, bandwidth=1.2, estimator="block", block_size=(2, 4))
    want = [
        mmd2(x[2 * i : 2 * i + 2], y[4 * i : 4 * i + 4], bandwidth=1.2, estimator="unbiased").item()
        for i in range(3)
    ]
    assert uneven.item() == pytest.approx(np.mean(want), abs=1e-12)


def test_closed_form_for_gaussians():
    # E k(x, y) = (s^2 / (s^2 + 2 t^2))^(D/2) exp(-|m|^2 / (2 (s^2 + 2 t^2))) for N(0, t^2), N(m, t^2).
    width, sigma, shift, generator = 3, 1.5, 0.8, torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, width, generator=generator), torch.randn(4000, width, generator=generator)
    y[:, 0] += shift
    factor = (sigma**2 / (sigma**2 + 2)) ** (width / 2)
    truth = 2 * factor * (1 - math.exp(-(shift**2) / (2 * (sigma**2 + 2))))
    assert mmd2(x, y, bandwidth=sigma, estimator="unbiased").item() == pytest.approx(truth, rel=0.06)


@pytest.mark.parametrize("estimator", ["unbiased", "ustat", "block", "linear"])
def test_too_few_rows_are_refused_in_words(estimator):
    x, y = draw(1, 1)
    with pytest.raises(ValueError, match=r"needs at least 2 rows on each side, got 1 and 1") as caught:
        mmd2(x, y, estimator=estimator, block_size=2)
    assert isinstance(caught.value, PrefgenError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": "gausian"}, "'gausian' is not one of gaussian"),
        ({"estimator": "vstat"}, "'vstat' is not one of biased"),
        ({"bandwidth": 0.0}, "sigma must be positive"),
        ({"bandwidth": "auto"}, "neither numbers, 'mean' nor 'median'"),
        ({"coefs": (1.0, 2.0), "bandwidth": 1.0}, "2 numbers for 1 bandwidths"),
        ({"wx": torch.ones(3)}, r"wx: shape \(3,\) does not match 6 rows"),
        ({"wx": -torch.ones(6)}, "normalize=False"),
        ({"wx": torch.ones(6, requires_grad=True)}, "pass wx.detach"),
        ({"estimator": "unbiased", "normalize": False}, "defined for 'biased' only"),
        ({"estimator": "block", "block_size": 4}, "does not cut 6 and 6 rows"),
        ({"precision": "fp8"}, "'fp8' is not one of"),
        ({"backend": "triton"}, "backend='triton' cannot be used here"),
        ({"backend": "keops"}, "'keops' is not one of"),
    ],
)
def test_bad_arguments(change, words):
    x, y = draw(6, 6)
    with pytest.raises(MMDError, match=words):
        mmd2(x, y, **change)


def test_bad_shapes_and_dtypes():
    x, y = draw(6, 6)
    with pytest.raises(MMDError, match="with one D"):
        mmd2(x, y[:, :3])
    with pytest.raises(MMDError, match="floating point"):
        mmd2(x.long(), y.long())


def test_half_precision_inputs_are_read_as_they_are():
    x, y = draw(20, 18, width=32, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        left, right = x.to(dtype).requires_grad_(), y.to(dtype)
        value = mmd2(left, right, bandwidth=8.0)
        value.backward()
        assert value.dtype == torch.float32
        assert left.grad.dtype == dtype
        want = mmd2(left.detach().double(), right.double(), bandwidth=8.0).item()
        assert value.item() == pytest.approx(want, rel=1e-6)


def test_autocast_does_not_change_the_value():
    x, y = draw(40, 30, width=64, dtype=torch.float32)
    x.requires_grad_()
    for options in ({}, {"tile": 16}, {"backend": "dense"}):
        plain = mmd2(x, y, bandwidth=10.0, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = mmd2(x, y, bandwidth=10.0, **options)
        assert value.item() == pytest.approx(plain.item(), rel=1e-6)


def test_strided_and_expanded_rows():
    x, y = draw(8, 7)
    want = mmd2(x, y, bandwidth=1.2).item()
    assert mmd2(x.T.contiguous().T, y, bandwidth=1.2).item() == want
    wide = torch.zeros(8, 10, dtype=x.dtype)
    wide[:, ::2] = x
    assert mmd2(wide[:, ::2], y, bandwidth=1.2).item() == pytest.approx(want, abs=1e-14)
    assert math.isfinite(mmd2(x[:1].expand(4, -1), y, bandwidth=1.2).item())


def test_nan_stays_nan():
    for dtype in (torch.float32, torch.float64):
        x, y = draw(6, 6, dtype=dtype)
        x[2, 1] = math.nan
        for options in ({}, {"tile": 4}, {"backend": "dense"}):
            assert math.isnan(mmd2(x, y, bandwidth=1.0, **options).item())


@pytest.mark.parametrize("grad", ["with_loss", "recompute"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel, estimator, grad):
    x, y = draw(5, 5, width=3)
    x.requires_grad_()
    y.requires_grad_()
    options = {
        "kernel": kernel,
        "estimator": estimator,
        "grad": grad,
        "bandwidth": 1.3,
        "multipliers": (1.0, 2.0),
    }
    assert torch.autograd.gradcheck(lambda a, b: mmd2(a, b, **options), (x, y))


def test_one_sided_gradients_and_upstream_factor():
    x, y = draw(6, 7, dtype=torch.float32)
    x.requires_grad_()
    (3.0 * mmd2(x, y, bandwidth=1.0)).backward()
    both_y = y.clone().requires_grad_()
    (full,) = torch.autograd.grad(mmd2(x, both_y, bandwidth=1.0), x)
    torch.testing.assert_close(x.grad, 3.0 * full)
    assert y.grad is None


def test_second_derivatives_are_refused():
    x, y = draw(6, 7)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mmd2(x, y, bandwidth=1.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_terms_cached_term_and_signed_measures():
    x, y = draw(6, 7)
    x.requires_grad_()
    for estimator in ("biased", "unbiased"):
        options = {"bandwidth": 1.3, "estimator": estimator}
        terms = mmd2(x, y, return_terms=True, **options)
        value = mmd2(x, y, **options)
        torch.testing.assert_close(terms.xx + terms.yy - 2 * terms.xy, value)
        (a,) = torch.autograd.grad(terms.xx - 2 * terms.xy, x)
        (b,) = torch.autograd.grad(value, x)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(mmd2(x, y, yy=terms.yy.detach(), **options), value)
    w, v = torch.randn(6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    want, want_x, _ = reference_mmd2(x.detach().numpy(), y.numpy(), sigmas=[1.3], wx=w, wy=v)
    value = mmd2(x, y, bandwidth=1.3, wx=w, wy=v, normalize=False)
    (grad,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(want, abs=1e-12)
    assert np.abs(grad.numpy() - want_x).max() <= 1e-12
    with pytest.raises(MMDError, match="without gradient"):
        mmd2(y, x, yy=0.1)


def test_root_and_cmmd():
    x, y = draw(6, 7)
    x.requires_grad_()
    assert mmd(x, y, bandwidth=1.0).item() == pytest.approx(
        math.sqrt(mmd2(x, y, bandwidth=1.0).item()), rel=1e-9
    )
    (grad,) = torch.autograd.grad(mmd(x, x.detach(), bandwidth=1.0), x)
    assert grad.isfinite().all()
    unit = [z.detach() / z.detach().norm(dim=1, keepdim=True) for z in (x, y)]
    assert cmmd(x, y).item() == pytest.approx(1000 * mmd2(*unit, bandwidth=10.0).item(), rel=1e-9)


def test_default_multipliers_double_sigma_every_second_step():
    ordered = sorted(DEFAULT_MULTIPLIERS)
    assert [b / a for a, b in zip(ordered, ordered[1:], strict=False)] == pytest.approx([2**0.5] * 4)
