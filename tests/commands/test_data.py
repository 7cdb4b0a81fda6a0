import json

import pytest

from prefgen.cli import main
from prefgen.testing.data import make_embeddings, write_raw

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def history(tmp_path):
    return write_raw(tmp_path / "raw", num_users=8)


def run(capsys, *words):
    code = main(["data", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, [line for line in err.splitlines() if line.startswith("prefgen: error: ")]


def test_build_inspect_verify(tmp_path, history, capsys):
    out = tmp_path / "shards"
    code, text, errors = run(capsys, "build", "--history", history, "--out", out)
    assert (code, errors) == (0, [])
    assert "train: 4 users, 20 liked, 16 disliked images" in text
    assert f"shards are in {out}" in text
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0
    assert "train               4        4        20        16       1" in text
    code, text, _ = run(capsys, "verify", out, "--workers", 1)
    assert code == 0
    assert f"{out}: all well" in text


def test_verify_lists_problems_and_exits_2(tmp_path, history, capsys):
    out = tmp_path / "shards"
    run(capsys, "build", "--history", history, "--out", out)
    path = out / "test-000000.tar"
    path.write_bytes(path.read_bytes()[:-700])
    code, text, errors = run(capsys, "verify", out, "--workers", 1)
    assert code == 2
    assert "test-000000.tar: checksum differs" in text
    assert len(errors) == 1
    assert "problem(s), listed above" in errors[0]


def test_skipping_is_reported(tmp_path, history, capsys):
    first = json.loads(history.read_text().splitlines()[0])
    (history.parent / first["liked"][0]["image"]).write_bytes(b"torn")
    out = tmp_path / "shards"
    code, _, errors = run(capsys, "build", "--history", history, "--out", out)
    assert code == 2
    assert "user u000000: liked[0]" in errors[0]
    code, text, _ = run(capsys, "build", "--history", history, "--out", out, "--on-bad", "skip")
    assert code == 0
    assert "left out: 1 x bad image" in text
    assert "1 x bad image" in run(capsys, "inspect", out)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "--history", "none.jsonl", "--out", "x"), "no history file at none.jsonl"),
        (("inspect", "nowhere"), "no shard index at nowhere"),
        (("verify", "pipe:touch hacked"), "is not a local path"),
        (("verify", "nowhere", "--workers", "-1"), "--workers must be 0 or more"),
        (
            ("build", "--history", "h", "--out", "x", "--fractions", "1,2"),
            "--fractions: expected three numbers",
        ),
        (("build", "--out", "x"), "--history"),
        ((), "ACTION"),
        (("shred",), "shred"),
    ],
)
def test_mistakes_get_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, *words)
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]


def test_inspect_shows_who_made_embeddings(tmp_path, capsys):
    code, text, _ = run(
        capsys, "inspect", make_embeddings(tmp_path, num_users=4, header={"mllm": "sha256:7"})
    )
    assert code == 0
    assert '"mllm": "sha256:7"' in text
