"""What the configuration of stage inject refuses, and which inputs it asks for."""

import subprocess
import sys

import pytest

from prefgen.config import load_config
from prefgen.errors import ConfigError


def test_presets_load():
    config = load_config("inject", preset="mini")
    assert config.model.parts == ("aligned", "core", "image")
    assert config.run_dir == "work/mini/inject"
    assert config.model.projector == "work/mini/align/projector.safetensors"


@pytest.mark.parametrize("preset", ["mini", "sd15", "sdxl", "paper"])
def test_the_image_only_preset_is_the_same_training(preset):
    from prefgen.config import configs_folder, to_plain

    ours = to_plain(load_config("inject", preset=preset))
    file = configs_folder() / preset / "inject_image_only.yaml"
    other = to_plain(load_config("inject", file=file))
    assert list(other["model"].pop("parts")) == ["image"] * 3
    assert list(ours["model"].pop("parts")) == ["aligned", "core", "image"]
    assert other.pop("run_dir") == f"work/{preset}/inject_image_only"
    ours.pop("run_dir")
    if preset == "mini":  # what the baseline reads is new to the adapter both start from
        rate, higher = ours["optim"].pop("learning_rate"), other["optim"].pop("learning_rate")
        assert higher > rate
    assert other == ours, "apart from its parts the baseline must be trained alike"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inject.user_drop_rate=1.5", "inject.user_drop_rate=1.5"),
        ("inject.user_drop_rate=0.95", "inject.both_drop_rate"),
        ("inject.min_snr_gamma=0", "inject.min_snr_gamma=0"),
        ("model.parts=[core,text]", "model.parts"),
        ("model.parts=[]", "model.parts is empty"),
        ("model.frozen_dtype=float8", "model.frozen_dtype"),
        ("data.max_eval_users=1", "data.max_eval_users=1"),
    ],
)
def test_refusals_name_the_key(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config("inject", overrides=[override])
    assert message in str(caught.value)


def test_inputs_are_asked_for_before_torch(tmp_path):
    config = load_config("inject", overrides=[f"workdir={tmp_path}"])
    inputs = {needed.key: needed for needed in config.required_inputs()}
    histories, models = {"data.shards", "data.embeddings"}, {"model.pipeline", "model.projector"}
    assert set(inputs) == histories | models | {"model.init_adapter"}
    with pytest.raises(ConfigError, match="run 'prefgen fit --stage align workdir="):
        inputs["model.projector"].check()
    alone = load_config("inject", overrides=["model.parts=[image]"])
    assert "model.projector" not in {needed.key for needed in alone.required_inputs()}


def test_the_configuration_imports_no_torch():
    code = "import prefgen.stages.inject.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sharding_needs_plain_weights():
    words = ["trainer.strategy=fsdp2", "model.memory_format=channels_last"]
    with pytest.raises(ConfigError, match="needs model.memory_format=contiguous, got channels_last"):
        load_config("inject", overrides=words)
