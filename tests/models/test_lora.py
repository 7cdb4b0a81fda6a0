import errno

import pytest
import torch

from prefgen.errors import CheckpointError
from prefgen.models.lora import WEIGHTS_NAME, add_lora, load_lora, save_lora
from prefgen.models.mllm import MLLM
from prefgen.testing.families import tiny_family_mllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_family_mllm(tmp_path_factory.mktemp("mllm"), family="idefics3")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_lora_comes_into_place_whole(folder, tmp_path, monkeypatch):
    """A save that dies leaves the older LoRA with its own lineage, and the next one clears its remains."""
    place = tmp_path / "lora"
    lora = add_lora(MLLM.load(folder), rank=2)
    save_lora(lora, path=place, mllm_hash="first")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert set(before) == {WEIGHTS_NAME, "adapter_config.json", "prefgen.json"}
    assert str(folder).encode() not in before["adapter_config.json"], "a path of the machine that trained"
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_lora(lora, path=place, mllm_hash="second")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    save_lora(lora, path=place, mllm_hash="second")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert (place / WEIGHTS_NAME).read_bytes() != before[WEIGHTS_NAME]
    with pytest.raises(CheckpointError, match="trained on another MLLM"):
        load_lora(MLLM.load(folder), path=place, mllm_hash="first")
