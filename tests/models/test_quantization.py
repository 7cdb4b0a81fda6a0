"""QLoRA at tiny size on a CPU; skipped where bitsandbytes is not installed."""

from importlib.util import find_spec

import pytest
import torch

from prefgen.errors import CheckpointError
from prefgen.models import quantization
from prefgen.models.lora import add_lora, load_lora, save_lora
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, Question, pack_batch
from prefgen.testing.families import tiny_family_mllm

ITEM = PackItem(
    history=["I like these images.", 0, 1],
    questions=[Question(pieces=[2, "Does this user like this image?"], answer="Yes")],
)


def test_without_the_package_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    path = tiny_family_mllm(tmp_path, family="idefics2")
    with pytest.raises(CheckpointError, match=r"pip install 'prefgen\[qlora\]'"):
        MLLM.load(path, quantization="nf4")


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (prefgen[qlora])"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["idefics2", "idefics3", "qwen2_5_vl"])
def test_lora_trains_on_four_bits(tmp_path, family):
    path = tiny_family_mllm(tmp_path / "mllm", family=family)
    mllm = MLLM.load(path, quantization="nf4")
    kinds = {type(layer).__name__ for layer in mllm.text_model.layers.modules()}
    assert "Linear4bit" in kinds
    assert all(type(part).__name__ != "Linear4bit" for part in mllm.model.lm_head.modules())
    vision = getattr(mllm.model.model, mllm.family.vision)
    assert all(type(part).__name__ != "Linear4bit" for part in vision.modules())
    features = mllm.encode_images(torch.rand(3, 3, 32, 32))
    whole = MLLM.load(path)
    assert whole.encode_images(torch.rand(3, 3, 32, 32)).shape == features.shape
    batch = pack_batch(mllm.encoder, items=[ITEM])
    wrapped = add_lora(mllm, rank=2)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = mllm.answer_loss(batch, image_features=features)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    save_lora(wrapped, path=tmp_path / "lora")
    again = MLLM.load(path, quantization="nf4")
    load_lora(again, path=tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(
            again.hidden(batch, image_features=features), mllm.hidden(batch, image_features=features)
        )
