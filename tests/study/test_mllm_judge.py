"""An MLLM as judge on tiny users: what it sees, symmetry, ties, a judge of places, who may not judge."""

import shutil
from dataclasses import replace

import pytest
import torch

from prefgen.errors import CheckpointError, ConfigError
from prefgen.evaluate.judges import Judge
from prefgen.evaluate.report_extra import extra_section
from prefgen.evaluate.study_report import about_mllm_judge
from prefgen.models.mllm import MLLM
from prefgen.models.questions import FIRST_SECOND
from prefgen.study.asking import MLLMForm, mllm_form
from prefgen.study.config import EvaluateModelConfig, load_evaluate_config
from prefgen.study.judged import Intervals
from prefgen.study.mllm_judge import MLLMJudge, ask_mllm_judge, choice_figures
from prefgen.study.users import load_users
from prefgen.testing.families import tiny_family_mllm

INTERVALS = Intervals(seed=0, num_resamples=100)
USERS, PROMPTS = 3, 2


@pytest.fixture(scope="module")
def users(tiny_study):
    return load_users(
        tiny_study / "shards",
        embeddings=tiny_study / "embeddings",
        pool=Judge.load(tiny_study / "models" / "judge.safetensors").subjects,
        num_users=USERS,
        num_prompts=PROMPTS,
        num_draws=1,
        image_size=(16, 16),
        seed=0,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_family_mllm(tmp_path_factory.mktemp("judge"), family="idefics3")


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(0)
    return {
        name: 2 * torch.rand(USERS, PROMPTS, 3, 16, 16, generator=generator) - 1
        for name in ("base", "own", "other")
    }


def judge_in(folder):
    return MLLMJudge(
        path=folder,
        family="idefics3",
        hash="0" * 64,
        independent=True,
        num_references=4,
        form=mllm_form(EvaluateModelConfig()),
    )


def asked(folder, users, drawn):
    count = []
    found = ask_mllm_judge(
        judge_in(folder), users=users, drawn=drawn, intervals=INTERVALS, progress=count.append
    )
    assert sum(count) == (len(drawn) - 1) * USERS * PROMPTS
    return found


def test_own_and_the_other_may_change_places(folder, users, drawn):
    pair = {"own": drawn["own"], "other": drawn["other"]}
    turned = {"own": drawn["other"], "other": drawn["own"]}
    wins = asked(folder, users, pair).wins["other"]
    assert (wins == 1 - asked(folder, users, turned).wins["other"]).all()


def test_the_same_pictures_are_a_tie(folder, users, drawn):
    found = asked(folder, users, {**drawn, "base": drawn["own"]})
    row = found.figures["own_against"]["base"]
    assert row["wins"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "num_users": USERS}
    assert row["ties"] == 1
    assert row["p"] == 1
    assert set(found.figures["own_against"]) == {"base", "other"}


def biased(folder, path):
    """The judge with weights under which "first" is always likelier than "second", whatever it sees."""
    mllm = MLLM.load(folder)
    ids = mllm.encoder.first_ids(FIRST_SECOND)
    with torch.no_grad():
        # One constant in every token's first channel is all that the last norm lets through.
        table = mllm.text_model.get_input_embeddings().weight
        table[:, 0] = 50.0
        table[ids[0], 0] = 51.0
        norm = mllm.text_model.norm.weight
        norm.zero_()
        norm[0] = 1.0
    mllm.save(path)
    return path


def test_a_judge_of_places_ends_at_one_half_and_says_so(folder, users, drawn, tmp_path):
    found = asked(biased(folder, tmp_path / "biased"), users, drawn)
    for row in found.figures["own_against"].values():
        assert row["wins"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "num_users": USERS}
        assert row["flips"] == {"mean": 1, "low": 1, "high": 1, "num_users": USERS}
        assert (row["ties"], row["first_chosen"], row["p_holm"]) == (1, 1, 1)
    assert found.figures["flips"]["mean"] == found.figures["first_chosen"] == 1
    assert found.figures["independent"] is True


def test_a_judge_of_pictures_is_counted_by_user_with_one_correction():
    sure = torch.tensor([[1.0, -1.0]])
    unsure = torch.tensor([[1.0, 1.0]])
    margins = {"base": sure.repeat(12, 1), "other": torch.cat([sure, unsure]).repeat(6, 1)}
    found = choice_figures(margins, num_users=6, intervals=INTERVALS)
    base, other = found.figures["own_against"]["base"], found.figures["own_against"]["other"]
    assert found.wins["base"].tolist() == [1] * 6
    assert found.wins["other"].tolist() == [0.75] * 6
    assert (base["ties"], base["flips"]["mean"], base["first_chosen"]) == (0, 0, 0.5)
    assert (other["ties"], other["flips"]["mean"], other["first_chosen"]) == (0.5, 0.5, 0.75)
    assert base["p"] == other["p"] == 2 / 2**6  # all six users on one side
    assert base["p_holm"] == other["p_holm"] == 2 * base["p"]
    assert found.figures["flips"]["mean"] == 0.25


def test_the_judge_sees_images_that_no_picture_was_drawn_from(users):
    for user in users:
        liked = user.held_back("liked", count=4)
        shown = {*user.shown("liked"), user.anchor_position}
        assert len(liked) == 4
        assert not {*liked} & {*user.real}
        fresh = len(user.history.liked) - len(shown | {*user.real})
        assert len([i for i in liked if i not in shown]) == min(4, fresh)
        everything = user.held_back("liked", count=99)
        assert sorted(everything) == [i for i in range(len(user.history.liked)) if i not in user.real]
        disliked = user.held_back("disliked", count=99)
        assert sorted(disliked) == list(range(len(user.history.disliked)))
        references = {*user.shown("disliked")}
        assert not {*disliked[: len(disliked) - len(references)]} & references


def test_a_history_of_one_image_is_shown_all_the_same(users):
    user = users[0]
    history = replace(user.history, liked=user.history.liked[:1], disliked=())
    lonely = replace(user, history=history, anchor_position=0, real=(0, 0), references=frozenset())
    assert lonely.held_back("liked", count=4) == [0]
    assert lonely.held_back("disliked", count=4) == []


def config(own, judge, *more):
    return load_evaluate_config(overrides=[f"model.mllm={own}", f"extra.mllm_judge={judge}", *more])


def test_the_mllm_that_was_trained_may_not_judge_unless_it_is_said(folder, tmp_path):
    with pytest.raises(ConfigError, match="is model.mllm, from which stage vqa trained; name another"):
        config(folder, f"{folder.parent}/{folder.name}/.")
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"holds the weights of model.mllm, .* extra.allow_own_mllm_judge"):
        MLLMJudge.find(config(folder, copy))
    allowed = MLLMJudge.find(config(folder, folder, "extra.allow_own_mllm_judge=true"))
    assert not allowed.independent
    other = tiny_family_mllm(tmp_path / "other", family="qwen3_vl", seed=1)
    found = MLLMJudge.find(config(folder, other, "evaluate.num_references=3"))
    assert found.independent
    assert (found.family, found.num_references) == ("qwen3_vl", 3)
    held = ("attention=eager", "quantization=nf4", "device=cuda", "precision=bfloat16")
    held = [f"model.{setting}" for setting in held]
    form = MLLMJudge.find(config(folder, other, *held)).form
    assert form == MLLMForm(dtype=torch.bfloat16, device="cuda", attention="eager", quantization="nf4")
    assert form == mllm_form(config(folder, other, *held).model)
    with pytest.raises(ConfigError, match="model.attention=flash_attention_2 takes half precision only"):
        config(folder, other, "model.attention=flash_attention_2", "model.precision=float32")
    assert MLLMJudge.find(load_evaluate_config()) is None
    with pytest.raises(ConfigError, match="no folder to compare them with"):
        MLLMJudge.find(config("someone/a-model", folder))


def test_the_reports_say_when_a_judge_is_not_independent():
    margins = {"base": torch.tensor([[1.0, -1.0], [2.0, 3.0]])}
    about = {"family": "qwen3_vl", "num_references": 4}
    figures = about | choice_figures(margins, num_users=2, intervals=INTERVALS).figures
    free, own = ({"mllm_judge": {**figures, "independent": known}} for known in (True, False))
    text = extra_section(own, label=str)
    assert "counts as not independent" in text
    assert "0.750 [0.500, 1.000]" in text
    assert "not independent" not in extra_section(free, label=str)
    study = (about_mllm_judge(one["mllm_judge"]) for one in (own, free))
    assert ["not independent" in words for words in study] == [True, False]
    assert about_mllm_judge({}) == ""


def test_what_is_no_judge_is_named_before_anything_is_drawn(folder, tmp_path):
    nowhere = config(folder, tmp_path / "nowhere").required_inputs()[-1]
    with pytest.raises(ConfigError, match=r"no multimodal LLM to judge at .*extra.mllm_judge=PATH"):
        nowhere.check()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="family 'llama'"):
        MLLMJudge.find(config(folder, tmp_path))
