"""The optional LoRA on the text cross-attention: trained along, kept, resumed, and off without users."""

import pytest
import torch
from safetensors.torch import load_file

from prefgen.errors import CheckpointError
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.sampling import sample
from prefgen.models.text_lora import load_text_lora
from prefgen.stages.inject.data import InjectData
from prefgen.stages.inject.module import InjectModule
from prefgen.testing.resume import assert_resume_is_exact

LORA = "model.text_lora_rank=2"


def test_off_by_default_nothing_of_it_is_there(make_config):
    module = InjectModule(make_config())
    assert not any("lora" in name for name, _ in module.named_parameters())


def test_it_trains_resumes_and_is_written_for_stock_diffusers(make_config, tmp_path, workdir):
    config = make_config(LORA, "trainer.limit_val_batches=0")
    assert_resume_is_exact(
        config,
        make_module=InjectModule,
        make_data=InjectData,
        tmp_path=tmp_path,
        num_workers=0,
        stop=2,
        steps=4,
    )
    files = list(tmp_path.rglob("text_lora.safetensors"))
    assert files
    state = load_file(files[0])
    assert all(name.startswith("unet.") and ".attn2." in name for name in state)
    assert any(bool(value.any()) for name, value in state.items() if "lora_B" in name), "it trained"
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(workdir / "pipeline", low_cpu_mem_usage=False)
    pipe.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    assert len(pipe.unet.peft_config) == 1


def test_without_users_the_base_model_bit_for_bit(make_config, workdir, tmp_path):
    module = InjectModule(make_config(LORA))
    trained = [p for name, p in module.named_parameters() if "lora_B" in name]
    assert trained
    assert {p.dtype for p in trained} == {torch.float32}
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.5)
    how = {"seeds": [3], "num_steps": 2, "guidance_scale": 3.0}
    plain = DiffusionBundle.load(str(workdir / "pipeline"))
    base = sample(plain, ["a fox"], **how)
    assert torch.equal(sample(module.bundle, ["a fox"], **how), base)
    module.adapter.attention.set(module.adapter.null_tokens(2))
    latents = torch.zeros(2, 4, 8, 8)
    text = module.bundle.encode_text(["a fox", ""])
    on = module.bundle.denoise(latents, timesteps=torch.tensor(5), text=text)
    for parameter in trained:
        torch.nn.init.zeros_(parameter)
    off = module.bundle.denoise(latents, timesteps=torch.tensor(5), text=text)
    assert not torch.equal(on, off), "with users it works"
    module.adapter.attention.clear()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is torn or does not fit"):
        load_text_lora(plain.unet, path=bad)
