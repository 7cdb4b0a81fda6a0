import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Idefics3ForConditionalGeneration

from prefgen.errors import CheckpointError, DataError
from prefgen.models.lora import WEIGHTS_NAME, add_lora, load_lora, save_lora
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, Question, pack_batch
from prefgen.models.prompts import PromptFormat
from prefgen.testing.mllm import tiny_mllm

HISTORY = ("I like these images.", 0, 1, 2, "I don't like these images.", 3)
QUESTION = Question(pieces=[4, "Does this user like this image?"], answer="Yes, because of the warm palette")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_mllm(tmp_path_factory.mktemp("mllm"))


@pytest.fixture
def mllm(folder):
    return MLLM.load(folder)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]


def test_size_and_one_token_an_image(mllm):
    assert sum(p.numel() for p in mllm.model.parameters()) < 300_000
    assert mllm.encoder.format.tokens_per_image == 1
    assert mllm.num_layers == 4


@pytest.mark.parametrize("scale_factor", [4, 2])
@pytest.mark.parametrize("wrapping", ["bare", "stock"])
def test_logits_equal_the_stock_model_with_pixels(tmp_path, images, wrapping, scale_factor):
    """Against Idefics3ForConditionalGeneration as anybody would call it. Measured 3e-7; tolerance 5e-6."""
    path = tiny_mllm(tmp_path, image_wrapping=wrapping, scale_factor=scale_factor)
    ours = MLLM.load(path)
    stock = Idefics3ForConditionalGeneration.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    item = PackItem(history=HISTORY, questions=[QUESTION])
    if wrapping == "stock":
        form = ours.encoder.format
        plain = PromptFormat(
            opening=form.opening,
            before_answer=form.before_answer,
            answer_lead=form.answer_lead,
            after_answer=form.after_answer,
        )
        inputs = processor(text=[plain.text(item, question=0)], images=[images], return_tensors="pt")
    else:
        text = ours.encoder.format.text(item, question=0)
        inputs = processor.tokenizer(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        inputs |= processor.image_processor([images], return_tensors="pt")
    batch = pack_batch(ours.encoder, items=[item])
    assert torch.equal(inputs["input_ids"], batch.input_ids)
    with torch.no_grad():
        expected = stock(**inputs).logits[0, batch.predictors]
        hidden = ours.hidden(batch, image_features=ours.encode_images(images))
        torch.testing.assert_close(ours.logits_at(hidden, batch.predictors), expected, atol=5e-6, rtol=0)


def test_save_and_load_give_the_same_numbers(mllm, images, tmp_path):
    mllm.save(tmp_path)
    again = MLLM.load(tmp_path)
    assert again.encoder.format == mllm.encoder.format
    assert torch.equal(again.encode_images(images), mllm.encode_images(images))


def test_plain_grey_picture_is_encoded(mllm):
    """Its normalised pixels are about zero, and the stock model drops pictures that are all zero."""
    zero = torch.zeros(2, 3, 32, 32)
    assert mllm.encode_images(zero).shape == (2, 1, mllm.hidden_size)


def test_fast_pixels_equal_the_stock_processor(mllm, images):
    stock = mllm.image_processor([[image] for image in images], return_tensors="pt")["pixel_values"][:, 0]
    torch.testing.assert_close(mllm.pixels(images), stock, atol=1e-6, rtol=0)
    array = np.stack([np.asarray(image) for image in images])
    assert torch.equal(mllm.pixels(array), mllm.pixels(images))
    assert mllm.pixels([Image.new("RGB", (50, 40))]).shape == (1, 3, 32, 32)
    with pytest.raises(DataError, match="expected uint8"):
        mllm.pixels(np.zeros((1, 8, 8, 3), dtype=np.uint8))


def test_generate_is_the_greedy_continuation(mllm, images):
    features = mllm.encode_images(images)
    question = Question(pieces=["What does this user like?"])
    said = mllm.generate(
        PackItem(history=HISTORY, questions=[question]), image_features=features, max_new_tokens=6
    )
    ids = pack_batch(mllm.encoder, items=[PackItem(history=HISTORY, questions=[question])])
    ids, new = ids.input_ids, []
    for _ in range(6):
        pixels = mllm.pixels(images[:4])[None]
        with torch.no_grad():
            new.append(int(mllm.model(input_ids=ids, pixel_values=pixels).logits[0, -1].argmax()))
        if new[-1] == mllm.encoder.stop_id:
            new.pop()
            break
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
    assert said == mllm.tokenizer.decode(new, skip_special_tokens=True).strip()
    with pytest.raises(DataError, match="one open question"):
        mllm.generate(PackItem(history=HISTORY, questions=[QUESTION]), image_features=features)


def test_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no multimodal LLM"):
        MLLM.load(tmp_path / "nothing")


def test_lora_starts_as_identity_and_travels_alone(folder, mllm, images, tmp_path):
    batch = pack_batch(mllm.encoder, items=[PackItem(history=HISTORY, questions=[QUESTION])])
    features = mllm.encode_images(images)
    with torch.no_grad():
        before = mllm.hidden(batch, image_features=features)
        wrapped = add_lora(mllm, rank=2)
        assert torch.equal(mllm.hidden(batch, image_features=features), before)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "text_model" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05)
        changed = mllm.hidden(batch, image_features=features)
    assert not torch.equal(changed, before)
    save_lora(wrapped, path=tmp_path, mllm_hash="aa")
    values = sum(p.numel() for p in trained.values())
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < 4 * values + 20_000
    fresh = MLLM.load(folder)
    with pytest.raises(CheckpointError, match="trained on another MLLM"):
        load_lora(fresh, path=tmp_path, mllm_hash="bb")
    load_lora(fresh, path=tmp_path, mllm_hash="aa")
    with torch.no_grad():
        assert torch.equal(fresh.hidden(batch, image_features=features), changed)


def test_lora_refusals(mllm, tmp_path):
    with pytest.raises(CheckpointError, match="no LoRA at"):
        load_lora(mllm, path=tmp_path)
    with pytest.raises(CheckpointError, match="no layer of the language model"):
        add_lora(mllm, targets=["nonsense"])
