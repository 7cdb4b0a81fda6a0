"""The adapter as a whole: its state and its file."""

import pytest
import torch

from prefgen.errors import CheckpointError
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.user_adapter import UserAdapter, load_user_adapter, save_user_adapter

SHAPE = FusionShape(parts=("aligned", "core", "image"), widths=(16, 10, 12), cross_width=16)


@pytest.fixture
def bundle(tiny_pipeline):
    return DiffusionBundle.load(str(tiny_pipeline))


@pytest.fixture
def adapter(bundle):
    torch.manual_seed(0)
    adapter = UserAdapter(bundle.unet, shape=SHAPE)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def draw_parts(count=2):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(count, width, generator=generator)
        for name, width in zip(SHAPE.parts, SHAPE.widths, strict=True)
    }


def test_state_holds_trained_parts_and_statistics_only(bundle, adapter):
    layers = len(adapter.attention.names)
    assert len(adapter.state_dict()) == 2 * layers + 6
    counts = adapter.num_parameters()
    assert counts["fusion"] == 38 * 64 + 64 + 2 * 16
    assert counts["attention"] == sum(p.numel() for p in adapter.attention.parameters())


def test_a_shape_for_another_unet_is_refused(bundle):
    with pytest.raises(CheckpointError, match="width 99 for a UNet of"):
        UserAdapter(bundle.unet, shape=FusionShape(parts=("core",), widths=(4,), cross_width=99))


def test_the_artefact_comes_back_and_broken_ones_are_refused(bundle, adapter, tmp_path):
    path = tmp_path / "deep" / "user_adapter.safetensors"
    with pytest.raises(CheckpointError, match="run 'prefgen fit --stage inject' first"):
        load_user_adapter(path, unet=bundle.unet)
    adapter.fusion.standardise(draw_parts(20))
    save_user_adapter(adapter, path=path, lineage={"mllm": "abc"})
    loaded = load_user_adapter(path, unet=bundle.unet)
    assert loaded.lineage == {"mllm": "abc"}
    assert loaded.adapter.fusion.shape == SHAPE
    for name, value in loaded.adapter.state_dict().items():
        assert torch.equal(value, adapter.state_dict()[name]), name
    assert not any(p.requires_grad for p in loaded.adapter.parameters())
    assert path.stat().st_mode & 0o777 == 0o644
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match="no user adapter or torn"):
        load_user_adapter(path, unet=bundle.unet)


def test_an_artefact_of_another_kind_is_refused(bundle, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no user adapter of version 1"):
        load_user_adapter(path, unet=bundle.unet)
