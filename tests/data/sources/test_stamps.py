import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from prefgen.cli import main
from prefgen.data.agents.cutouts import SubjectFolder, cutout_layers
from prefgen.data.agents.painters import paint
from prefgen.data.agents.render import AgentsPlan, agent_history, drawing, write_drawings
from prefgen.data.agents.world import ATTRIBUTE_GROUPS, GROUPS
from prefgen.data.sources.stamps import StampsPlan, import_stamps, phrase_of
from prefgen.errors import DataError

ANIMALS = ("owl", "crow", "duck", "tiger", "lion", "frog", "bear")
FOOD = ("pear", "plum", "leek")


def stamp(root, name, sentence, *, colour=(200, 120, 40), size=(60, 40)):
    """A shaded disc with an eye on nothing, and its sentence with translations below, as in the package."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", size)
    draw = ImageDraw.Draw(image)
    for x in range(8, 52):
        tone = tuple(round(value * x / 60) for value in colour)
        half = round(16 * (1 - ((x - 30) / 22) ** 2) ** 0.5)
        draw.line((x, 20 - half, x, 20 + half), fill=(*tone, 255))
    draw.ellipse((36, 12, 42, 18), fill=(10, 10, 10, 255))
    image.save(file.with_suffix(".png"))
    text = f"{sentence}\nde.utf8=Ein Ding.\nel.utf8=Κουκουβάγια.\n"
    file.with_suffix(".txt").write_text(text, encoding="utf-8")
    file.with_suffix(".dat").write_text("noflip\n")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "stamps"
    for i, name in enumerate(ANIMALS):
        stamp(root, f"animals/{name}", f"A {name} (a kind of thing).", colour=(20 * i + 60, 120, 40))
    for name in FOOD:
        stamp(root, f"food/fruit/cartoon/{name}", f"A {name}!  Eat it?")
    stamp(root, "food/fruit/pear_photo", "A pear.")
    return root


def test_what_can_be_used_becomes_subjects(tree, tmp_path):
    stamp(tree, "food/apple", "A green apple.")
    stamp(tree, "food/polaroid", "A polaroid.")
    stamp(tree, "food/eat", "Eat your broccoli!")
    stamp(tree, "food/long", "A very large and heavy pumpkin.")
    stamp(tree, "food/silent", "")
    (tree / "food/ghost.txt").write_text("A ghost.\n")
    (tree / "food/torn.txt").write_text("A nut.\n")
    (tree / "food/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (tree / "food/card.txt").write_text("A card.\n")
    Image.new("RGBA", (30, 30), (9, 9, 9, 255)).save(tree / "food/card.png")
    (tree / "food/dot.txt").write_text("A crumb.\n")
    dot = Image.new("RGBA", (90, 4))
    dot.paste((9, 9, 9, 255), (0, 0, 90, 1))
    dot.save(tree / "food/dot.png")
    content = import_stamps(tree, out=tmp_path / "out", plan=StampsPlan())
    assert {s["phrase"] for s in content["subjects"]} == {f"a {name}" for name in (*ANIMALS, *FOOD)}
    assert content["left_out"] == {
        "no picture": ["food/ghost"],
        "no sentence": ["food/silent"],
        "no thing": ["food/eat"],
        "too long": ["food/long"],
        "names an attribute": ["food/apple", "food/polaroid"],
        "cannot be drawn": ["food/torn.png"],
        "not cut out": ["food/card.png", "food/dot.png"],
    }
    pear = next(s for s in content["subjects"] if s["name"] == "pear")
    assert [(p["kind"], p["from"]) for p in pear["pictures"]] == [
        ("cartoon", "food/fruit/cartoon/pear.png"),
        ("photo", "food/fruit/pear_photo.png"),
    ]
    assert pear["family"] == "food"
    assert json.loads((tmp_path / "out/subjects.json").read_text()) == content


@pytest.mark.slow
def test_subjects_are_shared_out_and_held_out_by_family(tree, tmp_path):
    plan = StampsPlan(max_subjects=8, max_pictures=1)
    content = import_stamps(tree, out=tmp_path / "one", plan=plan)
    of = {f: [s for s in content["subjects"] if s["family"] == f] for f in ("animals", "food")}
    assert (len(of["animals"]), len(of["food"])) == (5, 3)  # in turn, until food has no more
    assert [sum(s["test"] for s in of[f]) for f in of] == [1, 1]
    assert len(content["left_out"]["enough subjects"]) == 2
    assert content["left_out"]["enough pictures"] == ["food/fruit/pear_photo.png"]
    again = import_stamps(tree, out=tmp_path / "two", plan=plan)
    assert again == content
    held = []
    for seed in range(4):
        content = import_stamps(tree, out=tmp_path / f"seed{seed}", plan=StampsPlan(seed=seed))
        held.append(tuple(s["name"] for s in content["subjects"] if s["test"]))
    assert len(set(held)) > 1


def test_svgs_are_drawn_and_may_not_open_files(tree, tmp_path):
    pytest.importorskip("resvg_py", reason="what draws SVGs comes with prefgen[mini]")
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    for name, size, inside in (
        ("kite", 'width="40pt" height="40pt"', ""),
        ("spy", 'width="40" height="40"', '<image xlink:href="/etc/hostname" width="9" height="9"/>'),
    ):
        body = f'{head} {size}>{inside}<circle cx="20" cy="20" r="12" fill="#f00"/></svg>'
        (tree / f"food/{name}.svg").write_text(body)
        (tree / f"food/{name}.txt").write_text(f"A {name}.\n")
    content = import_stamps(tree, out=tmp_path / "out", plan=StampsPlan())
    kite = next(s for s in content["subjects"] if s["name"] == "kite")
    assert kite["pictures"][0]["kind"] == "cartoon"
    with Image.open(tmp_path / "out" / kite["pictures"][0]["file"]) as image:
        assert image.getpixel((128, 128)) == (255, 0, 0, 255)
        assert image.getpixel((2, 2))[3] == 0
    assert content["left_out"]["cannot be drawn"] == ["food/spy.svg"]


@pytest.mark.parametrize(
    ("sentence", "phrase"),
    [
        ("A peacock (a male peafowl).", "a peacock"),
        ("A calculator.  6x7=42", "a calculator"),
        ("A “Fuji” apple.", "a fuji apple"),
        ("A knight’s helmet.", "a knight's helmet"),
        ("A F-22 Raptor!", "a f-22 raptor"),
        ("", ""),
    ],
)
def test_sentences_become_phrases(sentence, phrase):
    assert phrase_of(sentence) == phrase


def test_a_tree_that_is_none_is_refused(tree, tmp_path):
    with pytest.raises(DataError, match=r"no folder at .*nowhere; expected Tux Paint's tree"):
        import_stamps(tmp_path / "nowhere", out=tmp_path / "out", plan=StampsPlan())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no stamp can be used"):
        import_stamps(tmp_path / "empty", out=tmp_path / "out", plan=StampsPlan())
    (tree / "animals/owl.png").unlink()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tree / "animals/owl.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="leads outside"):
        import_stamps(tree, out=tmp_path / "out", plan=StampsPlan())
    with pytest.raises(DataError, match="test_share must lie between 0 and 1, got 1"):
        StampsPlan(test_share=1)


@pytest.fixture
def subjects(tree, tmp_path):
    import_stamps(tree, out=tmp_path / "subjects", plan=StampsPlan())
    return SubjectFolder(tmp_path / "subjects")


def test_layers_of_a_photo(subjects):
    drawn = subjects.layers(subjects.concepts()[0].pictures[0])
    body, line = np.asarray(drawn.shape) > 128, np.asarray(drawn.line)
    assert (line[~(np.asarray(drawn.colour)[..., 3] > 0)] == 0).all()
    assert 0.03 < (line[body] > 128).mean() < 0.4
    inside = np.asarray(drawn.colour)[..., 0][body]
    assert inside.min() < 30  # stretched over the whole ramp
    assert inside.max() > 225
    assert len(np.unique(np.asarray(drawn.flat)[..., 0][body])) <= 4 < len(np.unique(inside))


def test_every_value_changes_a_photo(subjects):
    drawn = subjects.layers(subjects.concepts()[0].pictures[0])
    for group, names in ATTRIBUTE_GROUPS.items():
        pictures = []
        for value in range(len(names)):
            values = np.zeros(len(GROUPS), dtype=np.int64)
            values[GROUPS.index(group)] = value
            image = paint(drawn, values, size=64, rng=np.random.default_rng(0))
            pictures.append(np.asarray(image, dtype=float))
        for i in range(len(names)):
            for j in range(i):
                assert np.abs(pictures[i] - pictures[j]).mean() > 0.5, (names[i], names[j])


def test_agents_and_drawings_are_made_of_stamps(subjects, tmp_path):
    plan = AgentsPlan(num_users={"test": 1}, min_images=3, max_images=4, image_size=16, subjects=subjects)
    history, images = agent_history(0, "test", plan=plan)
    held = {c.phrase for c in subjects.concepts() if c.test}
    assert {image.prompt for image in history.liked} <= held
    assert len(images) == len(history.liked) + len(history.disliked)
    shown = {drawing(i, split="train", seed=0, image_size=8, subjects=subjects).phrase for i in range(60)}
    assert len(shown) == 10
    out = tmp_path / "drawings"
    write_drawings(out, counts={"train": 2}, image_size=16, num_workers=2, subjects=subjects)
    about = json.loads((out / "attributes.json").read_text())
    assert about["unseen"] == [c.phrase for c in subjects.concepts() if c.test]
    assert about["attribution"] == "Pictures: Tux Paint stamps (tuxpaint.org), GPL-2, modified."


def test_a_folder_of_subjects_is_checked(subjects, tmp_path):
    with pytest.raises(DataError, match="prefgen data stamps PATH"):
        SubjectFolder(tmp_path / "nowhere").check()
    picture = subjects.concepts()[0].pictures[0]
    (subjects.folder / picture).unlink()
    with pytest.raises(DataError, match=f"{picture}: missing"):
        subjects.check()
    old = tmp_path / "old"
    old.mkdir()
    (old / "subjects.json").write_text('{"version": 0}')
    with pytest.raises(DataError, match="expected version 1"):
        SubjectFolder(old).concepts()
    (old / "two").mkdir()
    (old / "two" / "subjects.json").write_text('{"version": 1, "subjects": [{"name": "x"}]}')
    with pytest.raises(DataError, match="a subject is not whole"):
        SubjectFolder(old / "two").concepts()
    with pytest.raises(DataError, match="transparent everywhere"):
        cutout_layers(Image.new("RGBA", (8, 8)))


@pytest.mark.slow
def test_the_command_line(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "stamps", str(tree), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "10 subjects, 3 of them for test agents only, on 8 photos and 3 cartoons" in text
    with Image.open(out / "subjects.png") as sheet:
        assert sheet.size == (12 * 102, 120 + 18)
    assert main(["data", "stamps", str(tree), "--out", str(out)]) == 2
    assert "exists; choose another --out" in capsys.readouterr().err
    words = ["data", "agents", "--subjects", str(out), "--out", str(tmp_path / "raw"), "--workers", "1"]
    words += ["--train", "1", "--validation", "0", "--test", "1", "--min-images", "1", "--max-images", "2"]
    assert main(words) == 0
    assert (tmp_path / "raw" / "SOURCE.txt").read_text().startswith("Pictures: Tux Paint stamps")
    assert (
        main(["data", "build", "--history", str(tmp_path / "raw/history.jsonl"), "--out", str(out / "s")])
        == 0
    )
    words[3] = str(tmp_path / "nowhere")
    words[5] = str(tmp_path / "raw2")
    assert main(words) == 2
    assert "cannot be read" in capsys.readouterr().err
