"""Bandwidths, loss module, sums, test, Fourier features, reference, dispatch, compiled epilogue."""

import logging
import math

import numpy as np
import pytest
import torch

from mmd.reference import kernel_value
from prefgen.mmd import (
    MMDError,
    MMDLoss,
    Reference,
    describe_backend,
    kernel_matrix,
    kernel_sums,
    mmd2,
    mmd_test,
    native,
    rff_mmd2,
    to_sigma,
)
from prefgen.mmd.bandwidth import mean_bandwidth, median_bandwidth
from prefgen.mmd.dispatch import choose
from prefgen.mmd.gemm import cpu_gemm
from prefgen.mmd.spec import Spec


def draw(n, m, width=5, *, seed=0, shift=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    y = torch.randn(m, width, generator=generator, dtype=torch.float64) + shift
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize(
    ("given", "sigma"),
    [({"gamma": 2.0}, 0.5), ({"variance": 9.0}, 3.0), ({"blur": 0.7}, 0.7), ({"lengthscale": 2.0}, 2.0),
     ({"dan_bandwidth": 8.0}, 2.0)],
)  # fmt: skip
def test_to_sigma(given, sigma):
    assert to_sigma(**given) == pytest.approx(sigma)
    with pytest.raises(MMDError, match="exactly one"):
        to_sigma(**given, **({"gamma": 1.0} if "gamma" not in given else {"blur": 1.0}))
    with pytest.raises(MMDError, match="positive"):
        to_sigma(**dict.fromkeys(given, -1.0))


def test_mean_and_median_bandwidths():
    x, y = draw(30, 20)
    pooled = torch.cat((x, y))
    distances = torch.pdist(pooled)
    assert mean_bandwidth(x, y).item() == pytest.approx(distances.square().mean().sqrt().item(), rel=1e-12)
    assert median_bandwidth(x, y).item() == pytest.approx(distances.median().item(), rel=1e-9)
    far = 1e5
    assert mean_bandwidth(x.float() + far, y.float() + far).item() == pytest.approx(
        mean_bandwidth(x, y).item(), rel=1e-2
    )
    same = torch.ones(4, 3)
    assert mmd2(same, same).item() == 0.0


def test_loss_freezes_its_bandwidth():
    x, y = draw(12, 10)
    loss = MMDLoss(bandwidth="median")
    assert loss(x, y).item() == mmd2(x, y, bandwidth="median").item()
    sigma = loss.calibrate(x, y)
    assert loss.calibrated
    assert sigma.item() == pytest.approx(median_bandwidth(x, y).item())
    frozen = mmd2(3 * x, y, bandwidth=sigma.item(), multipliers=(0.5, 2**-0.5, 1, 2**0.5, 2)).item()
    assert loss(3 * x, y).item() == pytest.approx(frozen, rel=1e-12)
    again = MMDLoss(bandwidth="median")
    again.load_state_dict(loss.state_dict())
    assert again(3 * x, y).item() == pytest.approx(frozen, rel=1e-12)
    with pytest.raises(MMDError, match="nothing to calibrate"):
        MMDLoss(bandwidth=1.0).calibrate(x, y)


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "rq", "imq", "energy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernel_sums_with_signed_weights(kernel, dtype):
    x, y = draw(7, 9, dtype=dtype)
    weights = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = np.array([[kernel_value(float(((a - b).double() ** 2).sum()), kernel=kernel, sigmas=[1.4],
    coefs=[1.0])
                      for b in y] for a in x])  # fmt: skip
    sums = kernel_sums(x, y, weights, kernel=kernel, bandwidth=1.4)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert np.abs(sums.potential.numpy() - gram @ weights.numpy()).max() <= tolerance
    assert np.abs(sums.weighted_sum.numpy() - gram @ (weights[:, None] * y).numpy()).max() <= tolerance
    assert np.abs(kernel_matrix(x, y, kernel=kernel, bandwidth=1.4).numpy() - gram).max() <= tolerance
    plain = kernel_sums(x, y, kernel=kernel, bandwidth=1.4)
    torch.testing.assert_close(plain.weighted_mean, plain.weighted_sum / plain.potential[:, None])


def test_statistic_of_the_test_is_the_unbiased_estimate():
    x, y = draw(30, 41, shift=0.2)
    result = mmd_test(x, y, permutations=50, bandwidth=1.7)
    assert result.statistic == pytest.approx(
        mmd2(x, y, bandwidth=1.7, estimator="unbiased").item(), abs=1e-12
    )
    assert 1 / 51 <= result.p_value <= 1.0
    assert mmd_test(x, y, permutations=50, bandwidth=1.7) == result


def test_standard_error_matches_repeated_draws():
    values, errors = [], []
    for seed in range(60):
        x, y = draw(60, 50, seed=seed, shift=0.6)
        result = mmd_test(x, y, permutations=2, bandwidth=2.0)
        values.append(result.statistic)
        errors.append(result.std)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


def test_level_of_the_permutation_test():
    rejections = 0
    for seed in range(500):
        x, y = draw(14, 11, width=4, seed=seed, shift=0.0, dtype=torch.float32)
        rejections += mmd_test(x, y, permutations=99, seed=10_000 + seed).p_value <= 0.05
    # 97.6 % of binomial(500, 0.05); the seeds are fixed, so this passes or fails for good.
    assert 15 <= rejections <= 36, rejections


def test_power_of_the_permutation_test():
    found = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(200, 32, generator=generator), torch.randn(200, 32, generator=generator)
        y[:, 0] += 1.0
        found += mmd_test(x, y, permutations=99, seed=seed).p_value <= 0.05
    assert found >= 18


def test_fourier_features_approach_the_value():
    x, y = draw(200, 150, width=8, dtype=torch.float32)
    want = mmd2(x, y, bandwidth=2.0, multipliers=(1.0, 2.0)).item()
    got = rff_mmd2(x, y, bandwidth=2.0, multipliers=(1.0, 2.0), features=8192)
    assert got.item() == pytest.approx(want, rel=0.08)
    assert got.item() == rff_mmd2(x, y, bandwidth=2.0, multipliers=(1.0, 2.0), features=8192).item()
    with pytest.raises(MMDError, match="1 frequencies for 2"):
        rff_mmd2(x, y, bandwidth=2.0, multipliers=(1.0, 2.0), features=1)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_reference_caches_its_side(estimator):
    x, y = draw(12, 30)
    reference = Reference.from_features(y, bandwidth="median", estimator=estimator)
    x.requires_grad_()
    want = mmd2(x, y, bandwidth=list(reference.sigma), estimator=estimator)
    got = reference.mmd2(x)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    again = Reference.rebuild(reference.tensors(), reference.header())
    assert again.mmd2(x).item() == got.item()
    with pytest.raises(MMDError, match="not a saved MMD reference"):
        Reference.rebuild(reference.tensors(), {})


def test_landmarks_stand_for_the_sample():
    x, y = draw(40, 300, width=2)
    full = Reference.from_features(y, bandwidth=2.0)
    few = Reference.from_features(y, bandwidth=2.0, landmarks=40)
    assert few.rows.shape == (40, 2)
    assert few.mmd2(x).item() == pytest.approx(full.mmd2(x).item(), rel=1e-2)
    with pytest.raises(MMDError, match="between 1 and 300"):
        Reference.from_features(y, landmarks=301)


def choice(**changes):
    options = {
        "kernel": "gaussian",
        "alpha": 1.0,
        "chain": False,
        "estimator": "biased",
        "terms": (1.0, 1.0, 1.0),
    }
    spec = Spec(**options, **{key: changes.pop(key) for key in ("backend", "precision") if key in changes})
    setting = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "rows": (4096, 4096),
        "width": 768,
        **changes,
    }
    return choose(spec=spec, **setting)


def test_dispatch_rule(monkeypatch):
    assert choice().backend == "tiled"
    assert choice(precision="bf16").precision == "ieee"
    monkeypatch.setattr("prefgen.mmd.dispatch.triton_problem", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda = torch.device("cuda")
    assert choice(device=cuda).backend == "triton"
    assert choice(device=cuda, rows=(256, 256)).backend == "dense"
    assert choice(device=cuda, width=8).backend == "tiled"
    assert choice(device=cuda, dtype=torch.float64).backend == "tiled"
    assert choice(device=cuda, backend="tiled").reason == "asked for"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice(device=cuda).backend == "tiled"
    assert "8.0" in choice(device=cuda).reason
    monkeypatch.setenv("PREFGEN_MMD_BACKEND", "dense")
    assert choice().backend == "dense"
    assert choice(backend="tiled").backend == "tiled"
    monkeypatch.setenv("PREFGEN_MMD_BACKEND", "fast")
    with pytest.raises(MMDError, match="'fast' is not one of"):
        choice()


def test_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr("prefgen.mmd.dispatch._logged", set())
    x, y = draw(6, 6)
    with caplog.at_level(logging.INFO, logger="prefgen.mmd"):
        mmd2(x, y)
        mmd2(x, y)
    assert [record.message for record in caplog.records] == [
        "mmd: backend tiled, tile 512, precision ieee (cpu tensors)"
    ]
    assert describe_backend()[0].startswith("CPU: tiled, tile 512, GEMM ")


def test_gemm_override(monkeypatch):
    cpu_gemm.cache_clear()
    monkeypatch.setenv("PREFGEN_MMD_GEMM", "mkl")
    assert cpu_gemm() == "mkl"
    cpu_gemm.cache_clear()
    monkeypatch.setenv("PREFGEN_MMD_GEMM", "blas")
    with pytest.raises(MMDError, match="not one of mkl, onednn"):
        cpu_gemm()
    cpu_gemm.cache_clear()


@pytest.mark.parametrize("cause", ["switched off", "no compiler", "broken compiler"])
def test_without_the_compiled_epilogue_the_value_is_the_same(cause, monkeypatch, tmp_path, caplog):
    x, y = draw(30, 20, width=16, dtype=torch.float32)
    want = mmd2(x, y, bandwidth=4.0).item()
    native.native_status.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if cause == "switched off":
        monkeypatch.setenv("PREFGEN_MMD_NATIVE", "0")
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(
            native.shutil, "which", lambda name: None if cause == "no compiler" else "/bin/false"
        )
    with caplog.at_level(logging.WARNING, logger="prefgen.mmd"):
        status = native.native_status()
        assert status.library is None
        assert mmd2(x, y, bandwidth=4.0).item() == pytest.approx(want, rel=1e-6)
        assert "plain torch" in describe_backend()[0]
    assert len(caplog.records) == (0 if cause == "switched off" else 1)
    native.native_status.cache_clear()


def test_compiled_epilogue_is_built_and_cached(monkeypatch, tmp_path):
    if native.shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for expected in ("compiled by", "loaded from"):
        native.native_status.cache_clear()
        assert native.native_status().reason.startswith(expected)
    assert len(list((tmp_path / "prefgen").iterdir())) == 1
    native.native_status.cache_clear()


def test_value_is_finite_for_extreme_bandwidths():
    x, y = draw(10, 10, width=16, dtype=torch.float32)
    for sigma in (1e-8, 1e-3, 1e3, 1e8):
        x.requires_grad_()
        value = mmd2(x, y, bandwidth=sigma, multipliers=(0.5, 1.0, 2.0))
        (grad,) = torch.autograd.grad(value, x)
        assert math.isfinite(value.item())
        assert grad.isfinite().all()
