"""What stages wrote, read back: torn and foreign files are one line."""

import json

import pytest

from prefgen.errors import CheckpointError
from prefgen.study.stages import align_figures, probe_figures, run_figures


def test_test_users_come_before_validation_users(tmp_path):
    figures = {"mmd2": 0.1, "recall_1": 0.5, "recall_1_low": 0.4, "recall_1_high": 0.6}
    record = {
        "before": {"val/mmd2": 0.9},
        "fit": {f"val/{name}": value for name, value in figures.items()},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    found = align_figures(tmp_path)
    assert found["users"] == "validation"
    assert found["recall_1"] == {"mean": 0.5, "low": 0.4, "high": 0.6}
    assert (found["mmd_before"], found["mmd_after"]) == (0.9, 0.1)
    record["test"] = {f"test/{name}": value / 2 for name, value in figures.items()}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    found = align_figures(tmp_path)
    assert found["users"] == "test"
    assert found["recall_1"] == {"mean": 0.25, "low": 0.2, "high": 0.3}


def test_what_never_ran_is_none(tmp_path):
    assert align_figures(tmp_path) is None
    assert run_figures(tmp_path) is None


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "a").write_bytes(b"x" * 10)
    (tmp_path / "lora" / "b").write_bytes(b"x" * 5)
    (tmp_path / "metrics.json").write_text('{"steps": 3}')
    assert run_figures(tmp_path) == {"steps": 3, "epochs": None, "artefact": "lora", "bytes": 15}


@pytest.mark.parametrize("content", ["{", "[]", '{"choice": {}}', '{"choice": 3}'])
def test_a_probe_json_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "probe.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="probe"):
        probe_figures(path)
