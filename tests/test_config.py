"""Configuration: precedence, types, every trap of OmegaConf 2.4, and the words of refusal."""

from pathlib import Path

import pytest
import yaml

from prefgen import config as config_module
from prefgen.config import (
    PRESETS,
    StageConfig,
    build_config,
    configs_folder,
    load_config,
    preset_file,
    resolve_path,
    stage_config_type,
    stage_keys,
    to_plain,
    to_yaml,
)
from prefgen.config_keys import list_keys
from prefgen.errors import ConfigError
from prefgen.stages import STAGES
from prefgen.study.config import load_evaluate_config
from toy_config import NeedyConfig, ToyConfig


def build(*overrides, file=None, config_type=ToyConfig):
    return build_config(config_type, where="for stage 'toy'", file=file, overrides=overrides)


def refusal(*overrides, file=None, config_type=ToyConfig):
    with pytest.raises(ConfigError) as caught:
        build(*overrides, file=file, config_type=config_type)
    return str(caught.value)


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_precedence(tmp_path):
    file = written(tmp_path, "trainer: {max_steps: 7}\ntoy: {width: 5, factor: 2}\n")
    config = build("toy.width=9", file=file)
    assert (config.trainer.max_steps, config.toy.width, config.toy.factor) == (7, 9, 2.0)
    assert config.data.batch_size == 2


def test_interpolation_sees_the_override():
    config = build("workdir=work/x")
    assert config.run_dir == "work/x/toy"
    assert config.data.shards == "work/x/shards"


@pytest.mark.parametrize(
    ("override", "value"),
    [("toy.name=yes", "yes"), ("toy.name=1e-4", "1e-4"), ("toy.name=007", "007"), ("toy.name=null", "null"),
     ("toy.name=a=b", "a=b"), ("toy.name=", ""), ("toy.name=[x", "[x"), ("toy.name=#5", "#5")],
)  # fmt: skip
def test_text_stays_raw(override, value):
    assert build(override).toy.name == value


def test_text_of_a_file_stays_raw(tmp_path):
    assert build(file=written(tmp_path, "toy: {name: yes, maybe: 1e-4}")).toy.name == "yes"
    assert build(file=written(tmp_path, "toy: {name: yes, maybe: 1e-4}")).toy.maybe == "1e-4"


def test_values_take_their_declared_type():
    config = build(
        "optim.learning_rate=1e-4", "optim.betas=[0.5, 0.75]", "toy.sizes=[3,4,5]", "toy.switch=true",
        "toy.maybe=null", "trainer.gradient_clip_val=null", "toy.colour=green", "trainer.num_threads=1",
    )  # fmt: skip
    assert config.optim.learning_rate == 1e-4
    assert tuple(config.optim.betas) == (0.5, 0.75)
    assert tuple(config.toy.sizes) == (3, 4, 5)
    assert config.toy.switch is True
    assert config.toy.maybe is None
    assert config.trainer.gradient_clip_val is None
    assert config.toy.colour == "green"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.bach_size=64",
         "unknown key 'data.bach_size' for stage 'toy'. Did you mean 'data.batch_size'?"),
        ("dta.batch_size=64",
         "unknown key 'dta.batch_size' for stage 'toy'. Did you mean 'data.batch_size'?"),
        ("data=1", "unknown key 'data' for stage 'toy'."),
        ("data.batch_size=abc", "data.batch_size: expected int, got 'abc'"),
        ("data.batch_size=1.5", "data.batch_size: expected int, got '1.5'"),
        ("data.batch_size=", "data.batch_size: expected int, got ''"),
        ("data.batch_size=null", "data.batch_size: expected int, got 'null'"),
        ("optim.learning_rate=nan", "optim.learning_rate: expected float, got 'nan'"),
        ("toy.switch=maybe", "toy.switch: expected true or false, got 'maybe'"),
        ("toy.sizes=[1,x]", "toy.sizes: expected list of int, got '[1,x]'"),
        ("optim.betas=[0.9]", "optim.betas: expected [float, float], got '[0.9]'"),
        ("trainer.num_threads=x", "trainer.num_threads: expected int or null, got 'x'"),
        ("trainer.precision=bf17",
         "trainer.precision: 'bf17' is not one of 32-true, bf16-true, bf16-mixed, 16-mixed, auto"),
        ("--data.batch_size=64", "overrides are written without dashes: data.batch_size=64"),
        ("toy.width=1000_", "toy.width: expected int, got '1000_'"),
        ("toy.maybe", "'toy.maybe' is not an override; write key=value, e.g. trainer.max_steps=100"),
        ("=3", "'=3' is not an override; write key=value, e.g. trainer.max_steps=100"),
        ("toy.width=1\n", "toy.width: expected int, got '1\\n'"),
    ],
)  # fmt: skip
def test_refusals(override, message):
    assert refusal(override) == message


def test_a_key_given_twice():
    expected = "toy.width is given twice: toy.width=4 and toy.width=5; keep one"
    assert refusal("toy.width=4", "toy.width=5") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toy: {width: 4, width: 5}", "width is given twice"),
        ("toy: {widht: 4}", "unknown key 'toy.widht' for stage 'toy'. Did you mean 'toy.width'?"),
        ("toy: {width: four}", "toy.width: expected int, got 'four'"),
        ("toy: [1]", "unknown key 'toy' for stage 'toy'"),
        ("- 1", "expected 'key: value' lines, got list"),
        ("toy: {", "line 1"),
        ("toy: !!python/object/apply:os.system ['true']", "unknown key 'toy'"),
        ("? [a, b]\n: 3", "keys must be plain text"),
    ],
)
def test_refusals_name_the_file(tmp_path, text, message):
    file = written(tmp_path, text)
    got = refusal(file=file)
    assert got.startswith(str(file)) or str(file) in got
    assert message in got


def test_unreadable_files(tmp_path):
    assert "cannot read configuration file" in refusal(file=tmp_path / "absent.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read configuration file" in refusal(file=tmp_path / "b.yaml")


def test_required_key():
    assert refusal(config_type=NeedyConfig) == "needed is required; pass needed=VALUE"
    assert build("needed=4", config_type=NeedyConfig).needed == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("toy.width=1", "toy.factor=2"), ("toy.width=1", "toy.factor=2")),
        (("trainer.max_steps=-1",), ("trainer.max_steps=-1", "trainer.max_epochs=-1")),
        (("trainer.precision=16-mixed",), ("trainer.precision=16-mixed", "trainer.accelerator=cpu")),
        (("optim.early_stopping_patience=2",), ("optim.early_stopping_patience=2", "checkpoint.monitor")),
        (("optim.ema_decay=1.5",), ("optim.ema_decay=1.5",)),
        (("data.batch_size=0",), ("data.batch_size=0", "1")),
        (("checkpoint.keep_last=0",), ("checkpoint.keep_last=0",)),
    ],
)
def test_relations_name_every_key(overrides, words):
    message = refusal(*overrides)
    assert all(word in message for word in words), message


def test_bad_interpolations():
    assert "nowhere" in refusal("toy.name=${nowhere}")
    assert "toy.width" in refusal("toy.width=${toy.name}")
    assert "\n" not in refusal("toy.name=${oc.env:PREFGEN_SURELY_UNSET}")


def test_interpolated_numbers_are_checked_on_their_final_values():
    assert build("toy.width=${data.batch_size}").toy.width == 2
    assert "toy.width=2" in refusal("toy.width=${data.batch_size}", "toy.factor=3")


def test_yaml_round_trip(tmp_path):
    config = build("toy.name=yes", "toy.maybe=1e-4", "optim.learning_rate=3e-5", "toy.colour=green")
    assert build(file=written(tmp_path, to_yaml(config))) == config


def test_plain_values_only():
    def check(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                assert type(key) is str
                check(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner)
        else:
            assert value is None or type(value) in (int, float, str, bool)

    check(to_plain(build()))


def test_keys_have_help_and_the_stage_s_defaults():
    keys = {key.name: key for key in list_keys(ToyConfig)}
    assert keys["toy.width"].help == "Width of the trained layer."
    assert keys["trainer.max_steps"].default == 6
    assert keys["data.batch_size"].help == "Samples."
    assert keys["trainer.gradient_clip_val"].type_name == "float or null"
    assert [name for name, key in keys.items() if not key.help] == []


def test_presets(monkeypatch, tmp_path):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "align.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(config_module, "configs_folder", lambda: tmp_path)
    assert preset_file("align", preset="mini") == tmp_path / "mini" / "align.yaml"
    with pytest.raises(ConfigError, match="preset 'paper' has no configuration for .* 'align' yet; .*mini"):
        preset_file("align", preset="paper")
    with pytest.raises(ConfigError, match="unknown preset 'minni'; .* Did you mean 'mini'"):
        preset_file("align", preset="minni")
    with pytest.raises(ConfigError, match=r"unknown stage 'algin'; stages: vqa, .* Did you mean 'align'\?"):
        load_config("algin")


def test_asset_paths():
    assert resolve_path("work/x") == Path("work/x")
    assert resolve_path("asset:mini/clip").parts[-3:] == ("assets", "mini", "clip")
    for bad in ("asset:../errors.py", "asset:/etc"):
        with pytest.raises(ConfigError, match="leaves the folder"):
            resolve_path(bad)


SHIPPED = sorted(configs_folder().glob("*/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_configuration_loads(path):
    """A variant of a stage's file is named after it: inject_image_only.yaml."""
    assert path.parent.name in PRESETS
    stage = path.stem.partition("_")[0]
    if path.stem == "evaluate":
        config = load_evaluate_config(file=path, overrides=["workdir=elsewhere"])
        assert config.out.startswith("elsewhere/")
        return
    if path.stem == "demo_thresholds":
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        return
    config = load_config(stage, file=path, overrides=["workdir=elsewhere"])
    assert config.run_dir.startswith(f"elsewhere/{stage}")
    if path.stem == stage:
        assert load_config(stage, preset=path.parent.name, overrides=["workdir=elsewhere"]) == config


@pytest.mark.parametrize("preset", ["mini", "sd15", "sdxl", "paper"])
def test_a_preset_carries_from_shards_to_a_report(preset):
    """Every stage and the evaluation have a file, of one workdir, one MLLM and one pipeline."""
    stages = {stage: load_config(stage, preset=preset) for stage in STAGES}
    evaluation = load_evaluate_config(preset=preset)
    assert {one.workdir for one in (*stages.values(), evaluation)} == {f"work/{preset}"}
    asking = (stages["vqa"], stages["probe"], evaluation)
    assert len({one.model.mllm for one in asking}) == 1
    drawing = (stages["align"], stages["inject"], evaluation)
    assert len({one.model.pipeline for one in drawing}) == 1
    if preset != "mini":
        assert stages["probe"].model.image_encoder == evaluation.model.image_encoder
        assert stages["inject"].model.image_encoder == evaluation.model.image_encoder
        found = {one.trainer.precision for one in stages.values()} - {"32-true"}
        assert found == {"bf16-mixed"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_stage_has_help(stage):
    assert [key.name for key in stage_keys(stage) if not key.help] == []
    assert issubclass(stage_config_type(stage), StageConfig)
