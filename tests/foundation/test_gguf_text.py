"""A quantized file of llama.cpp's format becomes the model it was written from."""

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed (pip install 'prefgen[smol]')")

from prefgen.errors import DataError
from prefgen.foundation import gguf_text
from prefgen.foundation.gguf_text import add_image_tokens, read_gguf_text
from prefgen.testing.gguf_file import SPECIAL, tiny_gguf

TEXT = "I don't like these images. Yes, because of the warm palette."
NAMED = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model, tokenizer = tiny_gguf(path)
    return path, model, tokenizer


@pytest.fixture(scope="module")
def read(written):
    return read_gguf_text(written[0])


def test_logits_are_those_of_the_plain_model(written, read):
    _, model, tokenizer = written
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = model(ids).logits, read.model(ids).logits
    assert expected.std() > 0.1  # not a model that says the same to everything
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert read.quantization == {"Q8_0": 1, "Q4_1": 14, "F32": 5}
    assert (read.name, read.licence) == ("Tiny", "apache-2.0")


def test_rows_of_queries_and_keys_are_put_back_in_order(written, read):
    """With rows left as the file has them every logit would be wrong; this names the cause."""
    attention = written[1].model.layers[0].self_attn
    found = read.model.model.layers[0].self_attn
    assert torch.equal(found.q_proj.weight, attention.q_proj.weight)
    assert torch.equal(found.k_proj.weight, attention.k_proj.weight)


def test_text_falls_into_the_same_tokens_and_digits_stand_alone(written, read):
    tokenizer = written[2]
    for text in (TEXT, "<|im_start|>user\nWhich set?<|im_end|>\n"):
        assert read.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert read.tokenizer.decode(read.tokenizer(text)["input_ids"]) == text
    pieces = read.tokenizer.convert_ids_to_tokens(read.tokenizer("in 2025")["input_ids"])
    assert pieces[-4:] == ["2", "0", "2", "5"]
    tokens = [getattr(read.tokenizer, f"{name}_token") for name in ("unk", "bos", "eos", "pad")]
    assert tokens == [*SPECIAL, SPECIAL[2]]


def test_image_tokens_come_behind_the_old_ones_and_the_template_takes_parts(read):
    old = read.tokenizer
    new = add_image_tokens(old, named=NAMED)
    assert [new.convert_tokens_to_ids(token) for token in NAMED.values()] == [len(old), len(old) + 1]
    assert new(TEXT)["input_ids"] == old(TEXT)["input_ids"]
    assert len(new("<image>")["input_ids"]) == 1
    assert new.image_token == "<image>"
    plain = [{"role": "user", "content": "Which set?"}, {"role": "assistant", "content": "A"}]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    expected = old.apply_chat_template(plain, tokenize=False)
    assert new.apply_chat_template(plain, tokenize=False) == expected
    assert new.apply_chat_template(parts, tokenize=False) == expected
    parts[0]["content"].insert(0, {"type": "image"})
    assert "user\n<image>Which set?" in new.apply_chat_template(parts, tokenize=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "qwen2"}, "general.architecture is 'qwen2', expected 'llama'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe', expected 'smollm'"),
        ({"template": None}, "holds no chat template"),
        ({"extra_tensor": "output.weight"}, "output.weight is none of a Llama with tied embeddings"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "blk.0.attn_q.bias is none of a Llama"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    tiny_gguf(tmp_path / "other.gguf", **change)
    with pytest.raises(DataError, match=message):
        read_gguf_text(tmp_path / "other.gguf")


def test_a_missing_or_damaged_file_is_refused(tmp_path, written, monkeypatch):
    with pytest.raises(DataError, match="no GGUF file at"):
        read_gguf_text(tmp_path / "none.gguf")
    whole = written[0].read_bytes()
    for name, content in {"text": b"no model" * 9, "cut": whole[: len(whole) // 2], "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged or no GGUF file"):
            read_gguf_text(tmp_path / name)
    monkeypatch.setattr(gguf_text, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="need the package gguf, which is not installed"):
        read_gguf_text(written[0])


def test_a_model_with_a_part_missing_is_refused(tmp_path, monkeypatch):
    """A file whose tensors are fewer than its layers: nothing may stay random."""
    tiny_gguf(tmp_path / "tiny.gguf")
    reader = gguf_text._open(tmp_path / "tiny.gguf")
    reader.tensors.pop()
    monkeypatch.setattr(gguf_text, "_open", lambda path: reader)
    with pytest.raises(DataError, match="no whole Llama: .*Missing key"):
        read_gguf_text(tmp_path / "tiny.gguf")
