"""Images -> profile -> file -> images, on tiny models of the real classes."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.artefacts import MINI_ASSETS, Artefacts
from prefgen.errors import CheckpointError, DataError
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.calibration import Calibration
from prefgen.models.pixels import to_pil
from prefgen.models.projector import load_projector, save_projector
from prefgen.models.readout import fit_readout, save_readout
from prefgen.models.representation import like_probability
from prefgen.models.sampling import sample
from prefgen.models.user_adapter import load_user_adapter, save_user_adapter
from prefgen.models.user_schedule import UserSchedule
from prefgen.pipeline import PrefGenPipeline
from prefgen.profile import UserProfile
from prefgen.taste import TasteModels, read_images
from prefgen.testing.artefacts import save_tiny_artefacts


def pictures(count, *, seed):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


LIKED, DISLIKED = pictures(3, seed=0), pictures(2, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_artefacts(tmp_path_factory.mktemp("artefacts") / "tiny")


def load(folder):
    return PrefGenPipeline.load(folder, pipeline=folder / "pipeline", mllm=str(folder / "mllm"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return load(folder)


@pytest.fixture(scope="module")
def profile(pipeline):
    return pipeline.build_profile(LIKED, disliked=DISLIKED)


def same(first, second):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True))


def test_no_negative_prompt_is_what_the_base_was_trained_without(folder, profile):
    """SDXL's base knows zeros there, not the encoded empty text."""
    pipeline = load(folder)
    painter = pipeline.painter
    bundle = replace(painter.bundle, zero_empty_text=True)
    pipeline.painter = replace(painter, bundle=bundle)
    drawn = pipeline.generate("a boat", profile=profile, user_scale=0, num_steps=3)
    options = {"seeds": [0], "num_steps": 3}
    assert same(drawn, to_pil(sample(bundle, ["a boat"], **options)))
    assert not same(drawn, to_pil(sample(bundle, ["a boat"], negative_prompts=[""], **options)))


def test_build_save_load_generate(pipeline, profile, tmp_path):
    path = tmp_path / "me.safetensors"
    profile.save(path)
    loaded = UserProfile.load(path)
    assert (loaded.counts.liked, loaded.counts.disliked) == (3, 2)
    assert path.stat().st_size < 20_000
    options = {"user_scale": 0.8, "num_images": 2, "num_steps": 3}
    drawn = pipeline.generate("a red fox", profile=profile, **options)
    assert len(drawn) == 2
    assert same(drawn, pipeline.generate("a red fox", profile=loaded, **options))


def test_scale_0_is_the_stock_pipeline_bit_for_bit_before_and_after_scale_1(pipeline, profile, folder):
    from diffusers import StableDiffusionPipeline

    options = {"profile": profile, "num_images": 2, "num_steps": 3, "seed": 5}
    before = pipeline.generate("a red fox", user_scale=0.0, **options)
    with_user = pipeline.generate("a red fox", user_scale=1.0, **options)
    after = pipeline.generate("a red fox", user_scale=0.0, **options)
    stock = StableDiffusionPipeline.from_pretrained(
        folder / "pipeline", safety_checker=None, low_cpu_mem_usage=False
    )
    stock.set_progress_bar_config(disable=True)
    base = stock(
        ["a red fox"] * 2,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
    ).images
    assert same(before, base)
    assert same(after, base)
    assert not same(with_user, base)


def test_same_seed_same_image_and_image_i_is_seed_plus_i(pipeline, profile):
    draw = {"profile": profile, "num_steps": 3, "batch_size": 1}
    first = pipeline.generate("a boat", num_images=2, seed=7, **draw)
    assert same(first, pipeline.generate("a boat", num_images=2, seed=7, **draw))
    assert same(first[1:], pipeline.generate("a boat", num_images=1, seed=8, **draw))
    assert not same(first[:1], first[1:])


def test_who_it_is_for_matters(pipeline, profile):
    other = pipeline.build_profile(DISLIKED, disliked=LIKED)
    options = {"num_images": 1, "num_steps": 3, "user_scale": 1.0}
    assert not same(
        pipeline.generate("a boat", profile=profile, **options),
        pipeline.generate("a boat", profile=other, **options),
    )


def test_one_liked_image_is_enough(pipeline):
    lone = pipeline.build_profile(LIKED[:1])
    assert (lone.counts.liked, lone.counts.disliked, lone.counts.draws) == (1, 0, 1)
    assert not lone.image_negative.any()
    assert torch.equal(lone.image_embeds, lone.image_mean)
    assert not torch.equal(lone.sem_embeds, lone.sem_negative)
    assert len(pipeline.generate("a boat", profile=lone, num_steps=2)) == 1


def test_negative_twin_is_the_profile_of_the_sides_swapped(pipeline, profile):
    swapped = pipeline.build_profile(DISLIKED, disliked=LIKED)
    # The draws are the same sets of all images in other orders, so equal up to what order does.
    near = torch.cosine_similarity(profile.core_negative, swapped.core_embeds, dim=0)
    far = torch.cosine_similarity(profile.core_negative, profile.core_embeds, dim=0)
    assert near > far
    assert torch.equal(profile.image_negative, swapped.image_embeds)


def test_anchor_is_a_real_image_nearest_to_the_mean(pipeline, profile):
    rows = pipeline.taste.image_encoder.embed(LIKED)
    distances = (rows - rows.mean(dim=0)).norm(dim=1)
    torch.testing.assert_close(profile.image_embeds, rows[int(distances.argmin())])
    torch.testing.assert_close(profile.image_mean, rows.mean(dim=0))


def test_building_is_a_pure_function_of_its_seed(pipeline, profile):
    again = pipeline.build_profile(LIKED, disliked=DISLIKED)
    other = pipeline.build_profile(LIKED, disliked=DISLIKED, seed=1)
    assert torch.equal(again.sem_embeds, profile.sem_embeds)
    assert not torch.equal(other.sem_embeds, profile.sem_embeds)


def test_many_images_are_spread_over_draws_of_bounded_size(pipeline):
    many = pipeline.taste.build_profile(pictures(7, seed=3), num_draws=3, max_references=2)
    assert (many.counts.liked, many.counts.draws) == (7, 3)


def test_words_only_if_asked(pipeline, profile):
    assert profile.user_id is profile.likes is profile.dislikes is None
    told = pipeline.build_profile(LIKED, disliked=DISLIKED, words=True, user_id="ann")
    assert told.user_id == "ann"
    assert isinstance(told.likes, str)
    assert isinstance(told.dislikes, str)


def planted(count, *, width, seed):
    """(sem, labels): what a user likes is laid into sem along one direction an attribute."""
    generator, plan = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(5)
    labels = torch.rand(count, len(WORDS), generator=generator) < 0.4
    directions = torch.randn(len(WORDS), width, generator=plan)
    noise = 0.3 * torch.randn(count, width, generator=generator)
    return labels.float() @ directions + noise, labels


WORDS = ("red", "flat", "round", "sketched")


def test_explain_reads_planted_attributes_from_the_profile_alone(folder, profile, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    width = len(profile.sem_embeds)
    sem, labels = planted(200, width=width, seed=1)
    readout = fit_readout(sem, labels=labels, attributes=WORDS, lineage=dict(profile.lineage))
    save_readout(readout, path=copy / "attribute_readout.safetensors")
    pipeline = load(copy)
    sem, labels = planted(20, width=width, seed=2)
    for user in range(0, 20, 2):  # unseen: one row is what a user likes, the next what the user dislikes
        unseen = replace(profile, sem_embeds=sem[user], sem_negative=sem[user + 1])
        found = pipeline.explain(unseen)
        assert found.source == "readout"
        for text, truth in ((found.likes, labels[user]), (found.dislikes, labels[user + 1])):
            named = {word for word, rest in pairs(text) if rest > 0.5}
            assert named == {word for word, true in zip(WORDS, truth, strict=True) if true}
    assert not {"taste", "painter"} & set(vars(pipeline))


def pairs(text):
    for item in text.split(", "):
        word, number = item.removesuffix(")").split(" (")
        yield word, float(number)


def test_explain_says_nothing_of_dislikes_without_a_disliked_image(pipeline):
    found = pipeline.explain(pipeline.build_profile(LIKED))
    assert found.likes
    assert found.dislikes is None


def test_explain_gives_stored_words_first_and_refuses_what_it_cannot_read(folder, profile, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "attribute_readout.safetensors").unlink()
    older = load(copy)
    told = older.explain(replace(profile, likes="red, flat", dislikes=""))
    assert (told.likes, told.dislikes, told.source) == ("red, flat", "", "mllm")
    with pytest.raises(CheckpointError, match="no attribute readout at .* fit --stage align"):
        older.explain(profile)
    other = load(save_tiny_artefacts(tmp_path / "other", seed=9))
    with pytest.raises(CheckpointError, match="made by another mllm .* name the artefacts it was built with"):
        other.explain(profile)


STEPS = {"num_steps": 3, "num_images": 1}


def test_steering_left_alone_changes_nothing(pipeline, profile):
    plain = pipeline.generate("a boat", profile=profile, **STEPS)
    spelt = {"negative_user_scale": 0.0, "schedule": UserSchedule(), "block_scales": {"down": 1, "up": 1.0}}
    assert same(plain, pipeline.generate("a boat", profile=profile, **spelt, **STEPS))


def test_the_disliked_side_steers_the_unconditional_branch(pipeline, profile):
    plain = pipeline.generate("a boat", profile=profile, **STEPS)
    away = pipeline.generate("a boat", profile=profile, negative_user_scale=1.0, **STEPS)
    assert not same(plain, away)
    other = replace(profile, sem_negative=-profile.sem_negative)
    assert same(plain, pipeline.generate("a boat", profile=other, **STEPS))
    assert not same(away, pipeline.generate("a boat", profile=other, negative_user_scale=1.0, **STEPS))
    lone = pipeline.build_profile(LIKED[:1])  # without a disliked image its part is dropped
    assert "image" not in pipeline.painter.parts(lone, count=1, side="disliked")
    assert pipeline.generate("a boat", profile=lone, negative_user_scale=1.0, **STEPS)


def test_a_schedule_and_block_scales_reach_the_unet(pipeline, profile):
    plain = pipeline.generate("a boat", profile=profile, **STEPS)
    base = pipeline.generate("a boat", profile=profile, user_scale=0, **STEPS)
    for options in ({"schedule": UserSchedule(shape="late")}, {"block_scales": {"down": 0.0}}):
        drawn = pipeline.generate("a boat", profile=profile, **options, **STEPS)
        assert not same(drawn, plain)
        assert not same(drawn, base)
    nowhere = {"down": 0.0, "mid": 0.0, "up": 0.0}
    assert same(base, pipeline.generate("a boat", profile=profile, block_scales=nowhere, **STEPS))


def test_steering_that_could_do_nothing_is_refused(pipeline, profile):
    with pytest.raises(DataError, match="negative_user_scale 0.5 works in .* guidance_scale 1 switches off"):
        pipeline.generate("a boat", profile=profile, negative_user_scale=0.5, guidance_scale=1.0, **STEPS)
    with pytest.raises(DataError, match="negative_user_scale must be finite"):
        pipeline.generate("a boat", profile=profile, negative_user_scale=math.inf, **STEPS)
    with pytest.raises(DataError, match="no cross-attention is in block 'middle'"):
        pipeline.generate("a boat", profile=profile, block_scales={"middle": 1.0}, **STEPS)


def test_scores_from_the_vectors_need_no_mllm(folder, profile):
    fresh = load(folder)
    pictures_ = [*DISLIKED, *LIKED]
    scores = fresh.score(pictures_, profile=profile)
    assert not {"taste", "painter"} & set(vars(fresh))
    assert scores.scored_by == "both means"
    alone = [fresh.score([picture], profile=profile).values[0] for picture in pictures_]
    torch.testing.assert_close(scores.values, torch.stack(alone), rtol=0, atol=1e-4)
    # Means of the very images: -0.5 and 0.5.
    torch.testing.assert_close(scores.values[:2].mean(), torch.tensor(-0.5), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.values[2:].mean(), torch.tensor(0.5), rtol=0, atol=1e-4)


def test_scores_from_the_mllm_are_its_probabilities(pipeline, profile):
    told = []
    scores = pipeline.score(LIKED, profile=profile, liked=LIKED, disliked=DISLIKED, progress=told.append)
    assert scores.scored_by == "mllm"
    assert told == [3]
    assert bool(((scores.values > 0) & (scores.values < 1)).all())
    again = pipeline.score(LIKED[:1], profile=profile, liked=LIKED, disliked=DISLIKED)
    torch.testing.assert_close(again.values, scores.values[:1])
    expected = like_probability(pipeline.taste.mllm, liked=LIKED[:1], disliked=[], candidates=LIKED)
    lone = pipeline.score(LIKED, profile=profile, liked=LIKED[:1])
    torch.testing.assert_close(lone.values, expected)
    with pytest.raises(DataError, match="at least one liked image of the history, got 0"):
        pipeline.score(LIKED, profile=profile, disliked=DISLIKED)


def test_a_calibration_beside_the_lora_corrects_the_probability(folder, pipeline, profile, tmp_path):
    """A single image asked about behind a single draw: the correction itself, and of its own LoRA only."""
    plain = pipeline.score(LIKED, profile=profile, liked=LIKED[:1])
    assert plain.scored_by == "mllm"
    found = load(folder)
    found.artefacts = replace(found.artefacts, calibration=tmp_path / "calibration.json")
    calibration = Calibration(slope=0.5, offset=1.0, num_answers=9, lora=hash_folder(folder / "lora"))
    calibration.save(tmp_path / "calibration.json")
    scores = found.score(LIKED, profile=profile, liked=LIKED[:1])
    assert scores.scored_by == "calibrated mllm"
    expected = torch.sigmoid(0.5 * torch.logit(plain.values) + 1.0)
    torch.testing.assert_close(scores.values, expected, atol=1e-5, rtol=0)
    replace(calibration, lora="f" * 64).save(tmp_path / "calibration.json")
    with pytest.raises(CheckpointError, match="answers of another LoRA"):
        found.score(LIKED, profile=profile, liked=LIKED[:1])
    assert found.score(LIKED, profile=profile).scored_by == "both means", "which needs none"


def test_scores_for_a_profile_of_another_lineage_are_refused(pipeline, profile):
    other = replace(profile, lineage={**profile.lineage, "image_encoder": "f" * 64})
    with pytest.raises(CheckpointError, match="made by another image_encoder .* than that of the pipeline"):
        pipeline.score(LIKED, profile=other)


def test_no_liked_image_and_bad_counts_are_refused(pipeline, profile):
    with pytest.raises(DataError, match="at least one liked image, got 0"):
        pipeline.build_profile([], disliked=DISLIKED)
    with pytest.raises(DataError, match="num_images must be at least 1, got 0"):
        pipeline.generate("a boat", profile=profile, num_images=0)
    with pytest.raises(DataError, match="user_scale must be finite"):
        pipeline.generate("a boat", profile=profile, user_scale=math.nan, num_steps=2)


def test_each_side_loads_only_what_it_needs(folder, profile):
    fresh = load(folder)
    fresh.generate("a boat", profile=profile, num_steps=2)
    assert "taste" not in vars(fresh)
    fresh = load(folder)
    fresh.build_profile(LIKED[:1])
    assert "painter" not in vars(fresh)


def test_a_profile_of_another_lineage_is_refused(tmp_path, profile):
    other = load(save_tiny_artefacts(tmp_path / "other", seed=9))
    with pytest.raises(CheckpointError, match="made by another mllm .* build the profile again"):
        other.generate("a boat", profile=profile, num_steps=2)


def test_parts_that_do_not_belong_together_are_refused(folder, tmp_path, profile):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    other = save_tiny_artefacts(tmp_path / "other", seed=9)
    shutil.copy(other / "projector.safetensors", copy / "projector.safetensors")
    with pytest.raises(CheckpointError, match="trained with another projector than"):
        load(copy).generate("a boat", profile=profile)
    mixed = PrefGenPipeline.load(folder, pipeline=other / "pipeline", mllm=str(folder / "mllm"))
    with pytest.raises(CheckpointError, match="trained with another unet than"):
        mixed.generate("a boat", profile=profile)


def test_a_lora_of_another_mllm_and_a_probe_of_another_lora_are_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "lora" / "prefgen.json").write_text('{"mllm": "ff"}')
    with pytest.raises(CheckpointError, match="LoRA at .* was trained on another MLLM"):
        load(copy).build_profile(LIKED)
    other = save_tiny_artefacts(tmp_path / "other", seed=9)
    shutil.rmtree(copy / "lora")
    shutil.copytree(other / "lora", copy / "lora")
    with pytest.raises(CheckpointError, match="probe.json was made with another lora"):
        load(copy).build_profile(LIKED)


def test_a_projector_into_the_second_text_encoder_is_compared_with_that_one(folder, tmp_path, profile):
    """As with SDXL; the first encoder is another one and must not be asked."""
    copy, other = tmp_path / "copy", save_tiny_artefacts(tmp_path / "other", seed=9)
    shutil.copytree(folder, copy)
    second = copy / "pipeline" / "text_encoder_2"
    shutil.copytree(other / "pipeline" / "text_encoder", second)
    bundle = load(copy).painter.bundle
    adapter = load_user_adapter(copy / "user_adapter.safetensors", unet=bundle.unet)
    projector = load_projector(copy / "projector.safetensors")
    save_projector(
        projector.projector,
        path=copy / "projector.safetensors",
        lineage=projector.lineage,
        text={"text_encoder": "text_encoder_2"},
    )
    lineage = {
        **adapter.lineage,
        "text_encoder": hash_folder(second),
        "projector": hash_file(copy / "projector.safetensors"),
    }
    save_user_adapter(adapter.adapter, path=copy / "user_adapter.safetensors", lineage=lineage)
    assert load(copy).generate("a boat", profile=profile, num_steps=2)
    shutil.rmtree(second)
    shutil.copytree(folder / "pipeline" / "text_encoder", second)
    with pytest.raises(CheckpointError, match="trained with another text_encoder_2 than"):
        load(copy).generate("a boat", profile=profile, num_steps=2)


def test_missing_artefacts_are_named_with_the_command_that_makes_them(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no artefacts at .*nowhere"):
        PrefGenPipeline.load(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "user_adapter.safetensors").unlink()
    shutil.rmtree(copy / "lora")
    pipeline = load(copy)
    with pytest.raises(CheckpointError, match="no lora at .*fit --stage vqa"):
        pipeline.build_profile(LIKED)
    with pytest.raises(CheckpointError, match="no user adapter at .*fit --stage inject"):
        pipeline.generate("a boat", profile=None)


def test_a_work_folder_of_the_four_stages_is_found_too(folder, tmp_path):
    work = tmp_path / "work"
    for stage, name in (
        ("probe", "probe.json"),
        ("align", "projector.safetensors"),
        ("inject", "user_adapter.safetensors"),
    ):
        (work / stage).mkdir(parents=True)
        shutil.copy(folder / name, work / stage / name)
    shutil.copytree(folder / "lora", work / "vqa" / "lora")
    found = Artefacts.find(work, pipeline=folder / "pipeline", mllm=str(folder / "mllm"))
    found.require("lora", "probe", "projector", "user_adapter", "pipeline")


def test_a_work_folder_may_bring_its_own_mllm(tmp_path):
    (tmp_path / "vqa").mkdir()
    assert Artefacts.find(tmp_path).mllm == str(MINI_ASSETS / "mllm")
    (tmp_path / "mllm").mkdir()
    assert Artefacts.find(tmp_path).mllm == str(tmp_path / "mllm")
    assert Artefacts.find(tmp_path, mllm="owner/name").mllm == "owner/name"


def test_a_probe_of_a_deeper_mllm_is_refused(folder, tmp_path):
    record = json.loads((folder / "probe.json").read_text())
    record["choice"]["sem"]["layers"] = [2, 3, 4, 9]
    probe = tmp_path / "probe.json"
    probe.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="reads layer 9, but the MLLM at .* has 4"):
        TasteModels.load(
            mllm=str(folder / "mllm"),
            lora=folder / "lora",
            probe=probe,
            image_encoder=folder / "pipeline" / "image_encoder",
        )


def test_images_of_a_folder_in_the_order_of_their_names(tmp_path):
    for name, picture in zip(("b.png", "a.png"), LIKED, strict=False):
        picture.save(tmp_path / name)
    (tmp_path / ".DS_Store").write_text("x")
    assert same(read_images(tmp_path), [LIKED[1], LIKED[0]])
    assert same(read_images(tmp_path / "b.png"), [LIKED[0]])


def test_folders_that_hold_something_else_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder or image at"):
        read_images(tmp_path / "absent")
    with pytest.raises(DataError, match="is empty; put at least one image"):
        read_images(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt: image of 5 bytes cannot be decoded"):
        read_images(tmp_path)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "more").mkdir()
    with pytest.raises(DataError, match="more is a folder; images have to lie directly in"):
        read_images(tmp_path)
