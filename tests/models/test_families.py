"""Every family at tiny size against the stock model as anybody would call it, packed against one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from prefgen.errors import CheckpointError
from prefgen.models.families import FAMILIES, FAMILY_NAMES, family_of
from prefgen.models.lora import add_lora
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, Question, pack_batch
from prefgen.models.pooling import pooled_states
from prefgen.testing.families import SIDE, tiny_family_mllm

TOLERANCE = 5e-5
"""Largest difference allowed between logits; each family's is printed with -s."""

ITEMS = (
    PackItem(
        history=["I like these images.", 0, 1, 2, "I don't like these images.", 3],
        questions=[
            Question(
                pieces=[4, "Does this user like this image?"], answer="Yes, because of the warm palette"
            ),
            Question(pieces=[5, "Does this user like this image?"]),
            Question(pieces=["What does this user like?"], answer="red, blue"),
        ],
    ),
    PackItem(history=["I don't like these images.", 6], questions=[Question(pieces=[0, "Which set?"])]),
    PackItem(history=["I like"], questions=[Question(pieces=["First image:", 1, "Second image:", 2])]),
)
"""Unequal histories, a different target for each question, images side by side and at a history's end."""


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(7)]


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def mllm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return MLLM.load(tiny_family_mllm(folder, family=request.param))


def stock_pixels(mllm, pictures):
    """What the family's own image processor gives the stock model for one prompt with these pictures."""
    if mllm.family.name.startswith("qwen"):
        return dict(mllm.image_processor(pictures, return_tensors="pt"))
    inputs = dict(mllm.image_processor([pictures], return_tensors="pt"))
    if mllm.family.name == "llava_onevision":
        inputs["pixel_values"] = inputs["pixel_values"].view(len(pictures), -1, 3, SIDE, SIDE)
    return inputs


def stock_inputs(mllm, item, question, pictures):
    """Ids of the plain prompt text and pixels, as the family's processor would hand them to the model."""
    one = PackItem(history=item.history, questions=[item.questions[question]])
    text = mllm.encoder.format.text(one, question=0)
    inputs = {"input_ids": torch.tensor([mllm.tokenizer.encode(text, add_special_tokens=False)])}
    pieces = [*one.history, *one.questions[0].pieces]
    shown = [pictures[piece] for piece in pieces if isinstance(piece, int)]
    if shown:
        inputs |= stock_pixels(mllm, shown)
    if mllm.family.name.startswith("qwen"):
        kinds = (inputs["input_ids"] == mllm.encoder.image_token_id).int()
        inputs["mm_token_type_ids"] = kinds
    return inputs


@torch.no_grad()
def packed_logits(mllm, features):
    batch = pack_batch(mllm.encoder, items=ITEMS)
    return batch, mllm.logits_at(mllm.hidden(batch, image_features=features), batch.reading_points)


def test_packed_logits_equal_the_stock_model_asked_one_by_one(mllm, images):
    """Ids, positions, images and mask all at once: several images, unequal numbers of them in the batch."""
    features = mllm.encode_images(images)
    assert features.shape == (7, mllm.encoder.format.tokens_per_image, mllm.feature_size)
    batch, ours = packed_logits(mllm, features)
    expected = []
    for item in ITEMS:
        for number, question in enumerate(item.questions):
            inputs = stock_inputs(mllm, item, number, images)
            with torch.no_grad():
                logits = mllm.model(**inputs).logits[0]
            answer = 0
            if question.answer is not None:
                form = mllm.encoder.format
                answer = len(mllm.encoder.text_ids(form.answer_lead + question.answer + form.after_answer))
            expected.append(logits[len(logits) - answer - 1])
    difference = float((ours - torch.stack(expected)).abs().max())
    print(f"{mllm.family.name}: packed against one by one {difference:.1e}")
    assert difference < TOLERANCE
    assert float((ours[0] - ours[1]).abs().max()) > 1e-3, "or the target would not matter"


def test_pixels_equal_the_stock_processor(mllm, images):
    stock = stock_pixels(mllm, images[:3])["pixel_values"]
    ours = mllm.pixels(images[:3])
    assert ours.shape == (3, 3, SIDE, SIDE)
    if mllm.family.name.startswith("qwen"):
        with torch.no_grad():
            sizes = mllm.image_processor(images[:3], return_tensors="pt")["image_grid_thw"]
            expected = mllm.model.model.visual(stock, grid_thw=sizes).pooler_output
        found = mllm.encode_images(images[:3])[..., : mllm.hidden_size].reshape(expected.shape)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(ours, stock.reshape(3, 3, SIDE, SIDE), atol=1e-6, rtol=0)
    assert mllm.pixels([Image.new("RGB", (50, 40))]).shape == (1, 3, SIDE, SIDE)


PROCESSORS = {
    "idefics2": "Idefics2Processor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def stock_processor(mllm):
    """The family's processor; four of them want a video processor, which needs torchvision: those are made
    without their __init__, for the one method that writes placeholders."""
    kind = getattr(transformers, PROCESSORS[mllm.family.name])
    form = mllm.encoder.format
    parts = {"image_processor": mllm.image_processor, "tokenizer": mllm.tokenizer}
    if mllm.family.name.startswith("idefics"):
        return kind(**parts, image_seq_len=form.tokens_per_image)
    processor = object.__new__(kind)
    tokens = {"image_token": form.image_token, "fake_image_token": "<fake_token_around_image>"}
    tokens |= {"global_image_token": "<global-img>", "vision_feature_select_strategy": "full"}
    sizes = {"image_seq_len": form.tokens_per_image, "num_image_tokens": form.tokens_per_image - 1}
    for name, value in {**parts, **tokens, **sizes}.items():
        setattr(processor, name, value)
    return processor


def test_ids_equal_the_stock_processor(mllm, images):
    form, item = mllm.encoder.format, ITEMS[0]
    one = PackItem(history=item.history, questions=[item.questions[1]])
    batch = pack_batch(mllm.encoder, items=[one])
    shown = [images[row] for row in batch.image_rows.tolist()]
    processor, name = stock_processor(mllm), mllm.family.name
    bare = replace(form, image_opening="", image_closing="", tokens_per_image=1, shared_wrapping=False)
    text = bare.text(one, question=0)
    if name.startswith("idefics"):
        ids = processor(text=[text], images=[shown], return_tensors="pt")["input_ids"]
    else:
        nested = shown if name.startswith("qwen") else [shown]
        inputs = mllm.image_processor(nested, **({"return_row_col_info": True} if name == "smolvlm" else {}))
        written = [processor.replace_image_token(inputs, number) for number in range(len(shown))]
        if name.startswith("qwen"):  # the template writes what stands around, the processor what is inside
            written = [f"<|vision_start|>{words}<|vision_end|>" for words in written]
        parts = text.split(form.image_token)
        text = parts[0] + "".join(w + part for w, part in zip(written, parts[1:], strict=True))
        ids = torch.tensor([mllm.tokenizer.encode(text, add_special_tokens=False)])
    assert torch.equal(ids, batch.input_ids)


def test_cached_keys_and_values_give_the_same_logits_states_and_gradients(mllm, images):
    """The way of flash attention, here with the attention code of a CPU."""
    features = mllm.encode_images(images)
    batch, by_mask = packed_logits(mllm, features)
    cached = MLLM.assemble(
        mllm.model, tokenizer=mllm.tokenizer, image_processor=mllm.image_processor, sharing="cache"
    )
    _, by_cache = packed_logits(cached, features)
    torch.testing.assert_close(by_cache, by_mask, atol=TOLERANCE, rtol=0)
    states = [pooled_states(one, batch=batch, image_features=features) for one in (mllm, cached)]
    torch.testing.assert_close(states[1], states[0], atol=1e-4, rtol=1e-4)
    weight = mllm.text_model.layers[0].self_attn.v_proj.weight
    gradients = []
    for one in (mllm, cached):
        loss = one.answer_loss(batch, image_features=features)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-3)
    with pytest.raises(CheckpointError, match="use model.attention=sdpa"):
        cached.checkpoint_layers()


def test_generate_is_the_greedy_continuation_of_the_stock_model(mllm, images):
    item = PackItem(history=ITEMS[0].history, questions=[Question(pieces=["What does this user like?"])])
    said = mllm.generate(item, image_features=mllm.encode_images(images), max_new_tokens=5)
    new = []
    inputs = stock_inputs(mllm, item, 0, images)
    for _ in range(5):
        with torch.no_grad():
            token = int(mllm.model(**inputs).logits[0, -1].argmax())
        if token in (mllm.encoder.stop_id, mllm.tokenizer.eos_token_id):
            break
        new.append(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    assert said == mllm.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_gradient_checkpointing_changes_no_gradient(mllm, images):
    features = mllm.encode_images(images)
    batch = pack_batch(mllm.encoder, items=ITEMS)
    weight = mllm.text_model.layers[0].self_attn.v_proj.weight
    plain = torch.autograd.grad(mllm.answer_loss(batch, image_features=features), weight)[0]
    calls = []
    handle = mllm.text_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    mllm.checkpoint_layers()
    again = torch.autograd.grad(mllm.answer_loss(batch, image_features=features), weight)[0]
    handle.remove()
    mllm.text_model.activation_checkpointing_disable()
    mllm.text_model.eval()
    assert len(calls) == 2, "forward, and once more backward"
    torch.testing.assert_close(again, plain)


def test_lora_sits_in_the_language_model(tmp_path, mllm, images):
    fresh = MLLM.load(tiny_family_mllm(tmp_path, family=mllm.family.name))
    features = fresh.encode_images(images)
    _, before = packed_logits(fresh, features)
    wrapped = add_lora(fresh, rank=2)
    assert torch.equal(packed_logits(fresh, features)[1], before)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2, "two matrices in each of seven linear layers of four decoder layers"
    assert all(f".{fresh.family.text}.layers." in name for name in trained)


def test_families_are_told_apart(tmp_path):
    path = tiny_family_mllm(tmp_path, family="idefics2")
    assert family_of(path) is FAMILIES["idefics2"]
    with pytest.raises(
        CheckpointError, match="model.family=qwen3_vl, but the model .* is of family idefics2"
    ):
        MLLM.load(path, family="qwen3_vl")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is of family 'llama'; prefgen knows idefics2"):
        MLLM.load(path)
