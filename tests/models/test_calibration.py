import numpy as np
import pytest

from prefgen.errors import CheckpointError, DataError
from prefgen.models.calibration import Calibration, fit_calibration, reliability

RNG = np.random.default_rng(0)
TRUE = RNG.uniform(0.02, 0.98, 20_000)
TRUTH = RNG.random(20_000) < TRUE


def overconfident(probability):
    logits = 3 * np.log(probability / (1 - probability)) - 1
    return 1 / (1 + np.exp(-logits))


def test_true_probabilities_have_no_error_and_a_constant_has_a_known_one():
    assert reliability(TRUE, truth=TRUTH).error < 0.01
    found = reliability(np.full(10, 0.75), truth=np.arange(10) < 5)
    assert found.error == pytest.approx(0.25)
    assert found.counts == (0, 0, 0, 0, 0, 0, 0, 10, 0, 0)
    assert reliability(np.array([0.0, 1.0]), truth=np.array([False, True])).error == 0


def test_error_equals_a_plain_loop():
    stated = overconfident(TRUE)[:500]
    total = 0.0
    for low in range(10):
        inside = [i for i, p in enumerate(stated) if low / 10 <= p < (low + 1) / 10 or (low == 9 and p == 1)]
        if inside:
            total += abs(sum(stated[i] for i in inside) - sum(TRUTH[i] for i in inside))
    assert reliability(stated, truth=TRUTH[:500]).error == pytest.approx(total / 500)


def test_the_correction_undoes_what_was_done():
    stated = overconfident(TRUE)
    found = fit_calibration(stated, truth=TRUTH)
    assert found.slope == pytest.approx(1 / 3, abs=0.02)
    assert found.offset == pytest.approx(1 / 3, abs=0.05)
    assert reliability(stated, truth=TRUTH).error > 0.1
    assert reliability(found.apply(stated), truth=TRUTH).error < 0.015
    assert ((found.apply(stated) > 0.5) != (TRUE > 0.5)).mean() < 0.02


def test_answers_without_error_keep_a_finite_slope():
    truth = np.arange(100) < 50
    found = fit_calibration(np.where(truth, 1.0, 0.0), truth=truth)
    assert np.isfinite([found.slope, found.offset]).all()


def test_files_and_refusals(tmp_path):
    one = Calibration(slope=0.5, offset=-0.1, num_answers=7)
    assert Calibration.load(one.save(tmp_path / "calibration.json")) == one
    with pytest.raises(CheckpointError, match="test --stage vqa"):
        Calibration.load(tmp_path / "nothing.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no calibration at"):
        Calibration.load(tmp_path / "list.json")
    with pytest.raises(DataError, match="one kind only"):
        fit_calibration(np.array([0.2, 0.3]), truth=np.array([True, True]))
    with pytest.raises(DataError, match=r"within \[0, 1\]"):
        reliability(np.array([1.2]), truth=np.array([True]))


def test_a_calibration_belongs_to_a_lora(tmp_path):
    path = Calibration(slope=0.5, num_answers=7, lora="a" * 64).save(tmp_path / "calibration.json")
    assert Calibration.load(path, lora="a" * 64).lora == "a" * 64
    with pytest.raises(CheckpointError, match="answers of another LoRA .aaaaaaaaaaaa. than .* or delete it"):
        Calibration.load(path, lora="b" * 64)
    unknown = Calibration(slope=0.5, num_answers=7).save(tmp_path / "calibration.json")
    assert Calibration.load(unknown, lora="b" * 64).slope == 0.5
