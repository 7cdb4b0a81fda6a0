import json

import numpy as np
import pytest
from PIL import Image

from prefgen.cli import main

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def people(tmp_path):
    rng = np.random.default_rng(0)
    for side in ("liked", "disliked"):
        folder = tmp_path / "ana" / side
        folder.mkdir(parents=True)
        for i in range(3):
            blobs = rng.integers(0, 256, size=(5, 5, 3)).astype(np.uint8)
            Image.fromarray(blobs).resize((40, 40)).save(folder / f"{i}.png")
    (tmp_path / "ana" / "liked" / "torn.png").write_bytes(b"torn")
    return tmp_path / "ana"


def run(capsys, *words):
    code = main(["data", "import", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, [line for line in err.splitlines() if line.startswith("prefgen: error: ")]


def test_import_and_import_again(tmp_path, people, capsys):
    out = tmp_path / "out"
    words = ("folder", people, "--out", out, "--licence", "CC BY 4.0", "--workers", 1)
    code, text, errors = run(capsys, *words)
    assert (code, errors) == (0, [])
    assert "train: 1 users, 3 liked, 3 disliked images" in text
    assert "left out: 1 x broken-images (1 users)" in text
    assert f"1 users and 6 images are in {out / 'history.jsonl'}" in text
    assert json.loads((out / "import.json").read_text())["licence"] == "CC BY 4.0"
    with Image.open(out / "card.png") as card:
        assert card.width == 1200
    code, text, _ = run(capsys, *words)
    assert code == 0
    assert "nothing to do, the import is finished" in text


def test_list_cleaning(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["data", "import", "--list-cleaning"])
    text = capsys.readouterr().out
    assert "near-duplicates" in text
    assert "across-splits" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("folder", "nowhere", "--out", "x"), "no folder at nowhere; expected USER/liked/"),
        (("foldr", "a", "--out", "x"), "invalid choice: 'foldr'"),
        (("folder", "a"), "--out"),
        (("folder", "a", "--out", "x", "--clean", "tidy"), "--clean: unknown step 'tidy'"),
        (("folder", "a", "--out", "x", "--near-distance", 99), "--near-distance must be 0 to 16, got 99"),
        (("folder", "a", "--out", "x", "--min-judgements", 0), "--min-judgements must be 1 or more, got 0"),
        (("folder", "a", "--out", "x", "--workers", 0), "--workers must be 1 or more, got 0"),
        (("folder", "a", "--out", "x", "--fractions", "1,2"), "--fractions: expected three numbers"),
        (("folder", "a", "--out", "x", "--fractions", "1,2,3"), "must be three numbers >= 0 that sum to 1"),
        (("table", "a.txt", "--out", "x"), "a.txt is no .csv, .jsonl or .json file"),
        (("folder", "a", "--out", "x", "--licens", "y"), "unknown option '--licens'"),
    ],
)
def test_mistakes_get_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, *words)
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]


def test_a_run_of_nobody(people, capsys, tmp_path):
    code, _, errors = run(capsys, "folder", people, "--out", tmp_path / "out", "--min-judgements", 50)
    assert code == 2
    assert "nobody is left to import" in errors[0]
