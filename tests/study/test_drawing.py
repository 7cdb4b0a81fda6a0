"""The conditions: the words of the upper line, 8-bit rounding, and an unmoved UNet."""

import pytest
import torch

from prefgen.evaluate.judges import Judge
from prefgen.study.drawing import DrawSettings, Studio, _worded, draw_all, rounded
from prefgen.study.users import load_users

SETTINGS = DrawSettings(num_steps=2, guidance_scale=3.0, user_scale=1.0, batch_size=3)


@pytest.fixture
def studio(tiny_study):
    import json

    header = json.loads((tiny_study / "probe" / "probe.json").read_text())["lineage"]
    return Studio(
        pipeline=str(tiny_study / "models" / "pipeline"),
        projector=tiny_study / "align" / "projector.safetensors",
        header=header,
        unet_dtype=torch.float32,
        memory_format="contiguous",
    )


@pytest.fixture
def users(tiny_study):
    pool = Judge.load(tiny_study / "models" / "judge.safetensors").subjects
    return load_users(
        tiny_study / "shards",
        embeddings=tiny_study / "embeddings",
        pool=pool,
        num_users=3,
        num_prompts=2,
        num_draws=1,
        image_size=(16, 16),
        seed=0,
    )


def test_pictures_are_what_an_8_bit_file_holds():
    pixels = torch.tensor([-1.5, -1.0, 0.001, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert rounded(pixels)[0, 0, 0].tolist() == pytest.approx([-1, -1, 1 / 255, 1, 1], abs=1e-6)
    assert torch.equal(rounded(rounded(pixels)), rounded(pixels))


def test_conditions_share_their_noise_and_leave_the_unet_as_it_was(studio, users, tiny_study):
    adapter = studio.load_adapter(tiny_study / "inject" / "user_adapter.safetensors")
    before = dict(studio.bundle.unet.attn_processors)
    done = []
    drawn = draw_all(
        studio,
        users,
        adapters={"own": adapter},
        groups={},
        settings=SETTINGS,
        seed=0,
        progress=done.append,
    )
    assert list(drawn) == ["base", "own", "other", "words", "real"]
    assert all(pictures.shape == (3, 2, 3, 16, 16) for pictures in drawn.values())
    assert sum(done) == 4 * 6
    assert studio.bundle.unet.attn_processors == before
    again = studio.draw(
        [users[1].prompts[0]], seeds=[users[1].seeds[0]], settings=SETTINGS, progress=done.append
    )
    torch.testing.assert_close(again[0], drawn["base"][1, 0], atol=2.1 / 255, rtol=0)
    assert not torch.equal(drawn["own"], drawn["base"])
    assert not torch.equal(drawn["own"], drawn["other"])


def test_words_name_one_value_of_a_group_and_fit_the_encoder(studio, users):
    from dataclasses import replace

    groups = {"palette": ("red", "blue"), "finish": ("soft",)}
    user = users[0]
    told = replace(user, history=replace(user.history, liked_attributes=("red", "blue", "soft")))
    texts = {_worded(told, i, groups=groups, studio=studio, seed=s) for i in range(2) for s in range(8)}
    for text in texts:
        prompt, *words = text.split(", ")
        assert prompt in user.prompts
        assert "soft" in words
        assert len(set(words) & {"red", "blue"}) == 1
    assert any("red" in text for text in texts)
    assert any("blue" in text for text in texts)
    many = replace(
        user, history=replace(user.history, liked_attributes=tuple(f"zebra{i}" for i in range(40)))
    )
    text = _worded(many, 0, groups={}, studio=studio, seed=0)
    assert 1 < len(text.split(", ")) < 40
    assert len(studio.bundle.tokenizer(text)["input_ids"]) <= 24
