from pathlib import Path

import pytest
import torch

from prefgen.config import load_config
from prefgen.config_keys import read_yaml
from prefgen.foundation.loop import quick
from prefgen.precision import BF16_INSTRUCTIONS, has_bf16_products, has_fast_bf16, settle_precision
from prefgen.stages import STAGES


def with_cpu(monkeypatch, **found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", BF16_INSTRUCTIONS)
def test_a_cpu_with_bf16_instructions_takes_bf16(monkeypatch, name):
    with_cpu(monkeypatch, avx2=True, **{name: True})
    assert has_bf16_products()
    assert has_fast_bf16()
    settled = settle_precision(load_config("inject", overrides=["workdir=x"]))
    assert settled.trainer.precision == "bf16-mixed"
    assert (settled.model.frozen_dtype, settled.model.vae_dtype) == ("bfloat16", "bfloat16")
    with quick():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_cpu_without_them_takes_float32(monkeypatch):
    with_cpu(monkeypatch, avx2=True, avx512_f=True, avx512_bf16=False)
    settled = settle_precision(load_config("inject", overrides=["workdir=x"]))
    assert settled.trainer.precision == "32-true"
    assert (settled.model.frozen_dtype, settled.model.vae_dtype) == ("float32", "float32")
    with quick():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_gpu_decides_unless_the_cpu_is_asked_for(monkeypatch):
    with_cpu(monkeypatch, avx512_bf16=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert has_fast_bf16()
    assert not has_fast_bf16(accelerator="cpu")


def test_what_was_asked_for_stays(monkeypatch):
    with_cpu(monkeypatch, avx2=True)
    asked = ["workdir=x", "trainer.precision=bf16-mixed", "model.frozen_dtype=float16"]
    settled = settle_precision(load_config("inject", overrides=asked))
    assert (settled.trainer.precision, settled.model.frozen_dtype) == ("bf16-mixed", "float16")
    assert settled.model.vae_dtype == "float32"


def test_a_configuration_without_auto_passes(monkeypatch):
    with_cpu(monkeypatch, avx2=True)
    config = load_config("align", overrides=["workdir=x"])
    assert settle_precision(config) == config


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_its_frozen_format_to_the_device_if_asked(monkeypatch, stage):
    with_cpu(monkeypatch, avx2=True, avx512_bf16=True)
    config = load_config(stage, overrides=["workdir=x", "model.frozen_dtype=auto"])
    assert settle_precision(config).model.frozen_dtype == "bfloat16"


def test_the_mini_presets_leave_the_choice_to_the_device():
    for path in Path("configs/mini").glob("*.yaml"):
        values = {key: text for key, text in read_yaml(path) if key.endswith(("precision", "_dtype"))}
        assert set(values.values()) <= {"auto", "32-true", "float32"}, (path, values)
