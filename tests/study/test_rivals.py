"""The rivals on request: what they see, that nothing is left behind, that they do what they say."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefgen.errors import ConfigError, DataError
from prefgen.evaluate.judges import Judge
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.sampling import sample
from prefgen.study.asking import mllm_form
from prefgen.study.baselines import EXTRA_MEANINGS, draw_rivals, liked_minus_disliked, mean_embedding
from prefgen.study.config import (
    EXTRA_CONDITIONS,
    EvaluateExtraSection,
    EvaluateModelConfig,
    load_evaluate_config,
)
from prefgen.study.drawing import DrawSettings, Studio
from prefgen.study.feedback import draw_with_feedback
from prefgen.study.inversion import InvertedText, draw_inverted, learn
from prefgen.study.users import load_users
from prefgen.testing.diffusion import save_tiny_sdxl

SETTINGS = DrawSettings(num_steps=2, guidance_scale=3.0, user_scale=1.0, batch_size=4)


@pytest.fixture(scope="module")
def studio(tiny_study):
    import json

    return Studio(
        pipeline=str(tiny_study / "models" / "pipeline"),
        projector=tiny_study / "align" / "projector.safetensors",
        header=json.loads((tiny_study / "probe" / "probe.json").read_text())["lineage"],
        unet_dtype=torch.float32,
        memory_format="contiguous",
    )


@pytest.fixture(scope="module")
def users(tiny_study):
    return load_users(
        tiny_study / "shards",
        embeddings=tiny_study / "embeddings",
        pool=Judge.load(tiny_study / "models" / "judge.safetensors").subjects,
        num_users=3,
        num_prompts=2,
        num_draws=1,
        image_size=(16, 16),
        seed=0,
    )


def nothing(count):
    del count


@pytest.fixture(scope="module")
def base(studio, users):
    prompts = [prompt for user in users for prompt in user.prompts]
    seeds = [seed for user in users for seed in user.seeds]
    return studio.draw(prompts, seeds=seeds, settings=SETTINGS, progress=nothing).reshape(3, 2, 3, 16, 16)


def feedback(studio, users, **changes):
    settings = {"settings": SETTINGS, "count": 2, "weight": 0.8, "until": 0.6} | changes
    return draw_with_feedback(studio, users, progress=nothing, **settings)


@pytest.mark.slow
def test_all_of_them_draw_and_leave_the_unet_as_it_was(studio, users, base, tiny_study):
    adapter = studio.load_adapter(tiny_study / "inject_image_only" / "user_adapter.safetensors")
    before = dict(studio.bundle.unet.attn_processors)
    seconds = []

    @contextlib.contextmanager
    def timed(name):
        seconds.append(name)
        yield

    extra = EvaluateExtraSection(conditions=EXTRA_CONDITIONS[::-1], inversion_steps=3)
    rivals = draw_rivals(
        studio,
        users,
        extra=extra,
        image_only=adapter,
        mllm=str(tiny_study / "models" / "mllm"),
        lora=tiny_study / "vqa" / "lora",
        form=mllm_form(EvaluateModelConfig()),
        settings=SETTINGS,
        seed=0,
        timed=timed,
        progress=nothing,
    )
    assert list(rivals.drawn) == list(EXTRA_MEANINGS) == seconds
    assert all(pictures.shape == base.shape for pictures in rivals.drawn.values())
    for name in ("image_mean", "image_minus", "feedback"):
        assert not torch.equal(rivals.drawn[name], base), name
    assert not torch.equal(rivals.drawn["image_mean"], rivals.drawn["image_minus"])
    assert studio.bundle.unet.attn_processors == before
    assert len(rivals.facts["inversion"]["curve"]) == 3
    assert rivals.facts["inversion"]["parameters_per_user"] == 4 * 16


def test_means_see_the_references_only(users):
    user = users[0]
    rows = [i for i, key in enumerate(user.embeddings.image_keys) if key in user.references]
    liked = [i for i in rows if "/liked." in user.embeddings.image_keys[i]]
    found = mean_embedding(user, side="liked")
    torch.testing.assert_close(found, torch.from_numpy(user.embeddings.image[liked].mean(axis=0)))
    assert torch.equal(liked_minus_disliked(user, dislike_weight=0), found)
    minus = liked_minus_disliked(user, dislike_weight=0.5)
    assert float(minus.norm()) == pytest.approx(float(found.norm()), rel=1e-5)
    away = mean_embedding(user, side="disliked")
    cosines = [torch.cosine_similarity(x, away, dim=0) for x in (minus, found)]
    assert cosines[0] < cosines[1]
    with pytest.raises(DataError, match="no liked reference"):
        liked_minus_disliked(replace(user, references=frozenset()), dislike_weight=0.5)


def test_feedback_without_weight_or_references_is_the_base_model(studio, users, base):
    close = {"atol": 2.1 / 255, "rtol": 0}
    torch.testing.assert_close(feedback(studio, users, weight=1e-30), base, **close)
    bare = [replace(user, references=frozenset()) for user in users]
    torch.testing.assert_close(feedback(studio, bare), base, **close)
    assert torch.equal(feedback(studio, users, until=1e-4), base)  # the base path, bit for bit


def test_feedback_of_a_user_does_not_depend_on_who_else_is_drawn(studio, users):
    together, alone = feedback(studio, users), feedback(studio, users[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=2.1 / 255, rtol=0)
    stranger = replace(users[1], references=users[0].references, liked=users[0].liked)
    assert not torch.equal(feedback(studio, [stranger]), alone)
    unguided = replace(SETTINGS, guidance_scale=1.0)
    assert feedback(studio, users, settings=unguided).shape == together.shape


def test_inverted_words_learn_and_their_users_stay_apart(studio, users):
    text = InvertedText.of(studio.bundle, num_vectors=2)
    settings = {"num_steps": 6, "learning_rate": 0.05, "seed": 0, "progress": nothing}
    together = learn(text, users, batch_size=4, **settings)
    alone = learn(text, users[1:2], batch_size=4, **settings)
    torch.testing.assert_close(together.vectors[1:2], alone.vectors, atol=1e-4, rtol=1e-3)
    assert not torch.equal(together.vectors[0], together.vectors[1])
    assert np.isfinite(together.curve).all()
    drawn = draw_inverted(text, users, vectors=together.vectors, settings=SETTINGS, progress=nothing)
    changed = draw_inverted(text, users, vectors=together.vectors + 1, settings=SETTINGS, progress=nothing)
    assert not torch.equal(drawn, changed)
    # The bundle itself still knows no such words, and the copy still encodes everything else alike.
    assert "<taste0>" not in studio.bundle.tokenizer.get_vocab()
    prompt, seed = users[0].prompts[0], users[0].seeds[0]
    pictures = [sample(b, [prompt], seeds=[seed], num_steps=1) for b in (studio.bundle, text.bundle)]
    assert torch.equal(*pictures)


def test_gradients_reach_the_vectors_and_nothing_else(studio):
    text = InvertedText.of(studio.bundle, num_vectors=2)
    vectors = text.start(1).requires_grad_()
    text.encode(["a fox"], vectors=vectors).hidden.sum().backward()
    assert vectors.grad is not None
    assert float(vectors.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in text.bundle.text_encoder.parameters())


def test_two_text_encoders_are_refused(tmp_path):
    bundle = DiffusionBundle.load(str(save_tiny_sdxl(tmp_path / "sdxl")))
    with pytest.raises(ConfigError, match="one text encoder"):
        InvertedText.of(bundle, num_vectors=2)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("extra.conditions=[words_mlm]", "is not one of words_mllm"),
        ("extra.feedback_until=0", "must be above 0"),
        ("extra.scorers=[pickscore]", "expected name:folder"),
        ("extra.inversion_steps=0", "must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        load_evaluate_config(overrides=[word])


def test_relatives_of_image_only_need_its_adapter():
    words = ["extra.conditions=[image_mean,feedback]", "model.inject_image_only="]
    with pytest.raises(ConfigError, match="needs model.inject_image_only"):
        load_evaluate_config(overrides=words)
    assert load_evaluate_config(overrides=words[:1]).extra.conditions == ("image_mean", "feedback")
