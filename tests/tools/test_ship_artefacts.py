"""What the demo trained goes where an installed prefgen looks, unless it belongs to another foundation."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from prefgen.artefacts import Artefacts
from prefgen.errors import CheckpointError
from prefgen.testing.study import save_tiny_workdir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("ship_artefacts", ROOT / "tools" / "ship_artefacts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def work(tmp_path):
    folder = save_tiny_workdir(tmp_path / "work")
    shutil.move(folder / "models" / "attribute_readout.safetensors", folder / "align")
    (tmp_path / "out").mkdir()
    shutil.move(folder / "models" / "pipeline", tmp_path / "out" / "pipeline")
    shutil.move(folder / "models" / "mllm", tmp_path / "out" / "mllm")
    return folder


def test_everything_a_profile_needs_is_copied_with_a_card(tool, work, tmp_path):
    (work / "report").mkdir()
    (work / "report" / "metrics.json").write_text(json.dumps({"vqa_accuracy": {"mean": 0.9}, "stages": {}}))
    card = tool.ship(work, out=tmp_path / "out")
    Artefacts.find(tmp_path / "out").require(
        "lora", "probe", "projector", "attribute_readout", "user_adapter"
    )
    said = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] is None, "a path of the machine that trained"
    assert card["figures"] == {"vqa_accuracy": {"mean": 0.9}}
    assert all(size > 0 for size in card["bytes"].values())
    assert json.loads((tmp_path / "out" / "cards" / "artefacts.json").read_text()) == card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqa/calibration.json", "inject/text_lora.safetensors"])
def test_what_need_not_be_there_goes_along_and_an_older_one_does_not_stay(tool, work, tmp_path, name):
    source, target = work / name, tmp_path / "out" / Path(name).name
    tool.ship(work, out=tmp_path / "out")
    assert not target.exists()
    source.write_text("{}")
    assert tool.ship(work, out=tmp_path / "out")["bytes"][target.name] == 2
    assert target.read_text() == "{}"
    source.unlink()
    assert target.name not in tool.ship(work, out=tmp_path / "out")["bytes"]
    assert not target.exists()


def test_artefacts_of_another_foundation_are_refused(tool, work, tmp_path):
    (weights,) = (tmp_path / "out" / "mllm").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"0000")
    with pytest.raises(CheckpointError, match="belongs to another MLLM"):
        tool.ship(work, out=tmp_path / "out")
    assert not (tmp_path / "out" / "lora").exists()


def test_an_unfinished_run_is_refused_with_what_to_run(tool, work, tmp_path):
    (work / "inject" / "user_adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="prefgen fit --stage inject"):
        tool.ship(work, out=tmp_path / "out")
