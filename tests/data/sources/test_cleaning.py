"""Each cleaning step on a source made for it, with exact counts; and finding near-duplicates."""

import csv
from itertools import count

import numpy as np
import pytest

from prefgen.data.shards import assign_split
from prefgen.data.sources.pictures import NearIndex, describe
from prefgen.data.sources.steps import STEPS, parse_steps
from prefgen.errors import ConfigError, DataError


def user_of(split):
    return next(name for i in count() if assign_split(name := f"{split}{i}") == split)


@pytest.fixture
def table(tmp_path, tools):
    """table(rows of user, image bytes, liked) -> path."""

    def make(rows):
        (tmp_path / "pics").mkdir()
        with (tmp_path / "t.csv").open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["user_id", "image", "liked"])
            for i, (user, data, liked) in enumerate(rows):
                if data is not None:
                    (tmp_path / "pics" / f"{i}.png").write_bytes(data)
                lines.writerow([user, f"pics/{i}.png", liked])
        return tmp_path / "t.csv"

    return make


def rows_for_everything(picture):
    train, test = user_of("train"), user_of("test")
    return [
        *[(train, picture(i), "yes") for i in range(4)],
        (train, picture(2), "yes"),  # exact duplicate
        (train, picture(3, size=96, encoding="JPEG"), "yes"),  # near duplicate
        (train, picture(3, tint="GBR"), "yes"),  # the same in other colours: another image
        (train, picture(20), "no"),
        (train, picture(20), "yes"),  # contradicts the one before
        (train, b"torn", "no"),
        (train, picture(21)[:200], "no"),
        (train, None, "no"),
        (train, picture(22), "tie"),
        *[(test, picture(i), "no") for i in (2, 30, 31)],  # 2 is in train
        ("lonely", picture(40), "yes"),
        ("a/b", picture(41), "yes"),
    ]


def test_every_step_counts_what_it_takes(tmp_path, table, tools):
    path = table(rows_for_everything(tools.picture))
    report = tools.run("table", path, tmp_path / "out", min_judgements=2).report
    taken = {step["step"]: (step["judgements"], step["users"]) for step in report["cleaning"]}
    assert taken == {
        "ties": (1, 1),
        "broken-images": (3, 1),
        "contradictions": (2, 1),
        "exact-duplicates": (1, 1),
        "near-duplicates": (1, 1),
        "across-splits": (1, 1),
        "few-judgements": (1, 1),
    }
    assert report["cleaning"][1]["reasons"] == {"cannot be decoded": 2, "missing": 1}
    assert report["skipped"] == {"unusable user_id": 1}
    assert report["kept"]["splits"] == {
        "train": {"users": 1, "liked": 5, "disliked": 0},
        "test": {"users": 1, "liked": 0, "disliked": 2},
    }
    files = {path.stem for path in (tmp_path / "out" / "images").glob("*/*")}
    assert len(files) == report["kept"]["images"] == 7
    assert f"{1} few-judgements" not in (tmp_path / "out" / "card.md").read_text()


def test_steps_can_be_switched_off(tmp_path, table, tools):
    path = table(rows_for_everything(tools.picture))
    report = tools.run("table", path, tmp_path / "out", clean=("ties", "broken-images")).report
    assert report["kept"]["liked"] == 4 + 1 + 1 + 1 + 1 + 1
    assert report["kept"]["users"] == 3
    found = tools.histories(tmp_path / "out")
    assert len(found[user_of("test")]["disliked"]) == 3


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (("ties",), r"row 10: .*cannot be decoded.*add broken-images to --clean"),
        (("broken-images",), r"row 13: a tie.*add ties to --clean"),
    ],
)
def test_what_cannot_be_kept_stops_the_import_and_can_be_mended(tmp_path, table, tools, clean, message):
    path = table(rows_for_everything(tools.picture))
    with pytest.raises(DataError, match=message):
        tools.run("table", path, tmp_path / "out", clean=clean)
    # What was read is not read again: the images may even be gone.
    for image in (tmp_path / "pics").iterdir():
        image.unlink()
    report = tools.run("table", path, tmp_path / "out", clean=("ties", "broken-images")).report
    assert report["kept"]["users"] == 3


def test_nobody_left_says_which_step(tmp_path, table, tools):
    path = table([("u", tools.picture(1), "yes")])
    with pytest.raises(DataError, match="nobody is left to import .* few-judgements removed 1"):
        tools.run("table", path, tmp_path / "out", min_judgements=2)


@pytest.mark.parametrize("distance", [0, 1, 4, 9, 16])
def test_bands_find_what_comparing_all_finds(distance):
    rng = np.random.default_rng(distance)
    hashes = [int(value) for value in rng.integers(0, 2**63, size=40)]
    for value in list(hashes):
        for _ in range(6):
            flips = rng.choice(64, size=int(rng.integers(0, 20)), replace=False)
            hashes.append(value ^ sum(1 << int(bit) for bit in flips))
    index, kept = NearIndex(distance=distance), []
    for value in hashes:
        near = any((value ^ other).bit_count() <= distance for other in kept)
        assert index.add(value.to_bytes(8, "big"), colours=bytes(48)) == near
        if not near:
            kept.append(value)


def test_hash_survives_encoding_and_size_but_not_another_picture(tools):
    def distance(a, b):
        first, second = (int.from_bytes(describe(data).phash, "big") for data in (a, b))
        return (first ^ second).bit_count()

    assert describe(tools.picture(0)).phash != bytes(8)
    for number in range(10):
        same = tools.picture(number, encoding="JPEG", quality=70, size=96)
        assert distance(tools.picture(number), same) <= 4
        assert distance(tools.picture(number), tools.picture(number + 100)) > 16


def test_clean_option():
    assert parse_steps("few-judgements, ties") == ("ties", "few-judgements")
    assert parse_steps("all") == tuple(STEPS)
    assert parse_steps("none") == ()
    for text in ("tie", ""):
        with pytest.raises(ConfigError, match="unknown step"):
            parse_steps(text)
