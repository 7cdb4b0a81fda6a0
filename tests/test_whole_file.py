"""Files written whole or not at all: the old content until the end, and nothing beside it afterwards."""

import json
import subprocess
import sys

import pytest

from prefgen.whole_file import whole_file, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_and_fail(path, *, error, shared=False, meanwhile=lambda: None):
    with whole_file(path, shared=shared) as part:
        part.write_text("ours")
        meanwhile()
        raise error


@pytest.mark.parametrize("shared", [False, True])
def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path, shared):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with whole_file(path, shared=shared) as part:
        part.write_text("half")
        assert part.parent == tmp_path, "a renaming works within one file system only"
        assert part.suffix == ".part", "what looks for leftovers goes by the name"
        assert path.read_text() == "old"
        part.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["metrics.json"]


def test_the_folder_is_made(tmp_path):
    write_text(tmp_path / "a" / "b.txt", text="ä")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "ä".encode()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [["x.json"], []])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, shared, error, before):
    path = tmp_path / "x.json"
    for name in before:
        (tmp_path / name).write_text("old")
    with pytest.raises(type(error)) as caught:
        write_and_fail(path, error=error, shared=shared)
    assert caught.value is error
    assert names(tmp_path) == before
    assert not before or path.read_text() == "old"


def test_a_failure_before_anything_is_written_is_told_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="the reason"), whole_file(tmp_path / "x"):
        raise ValueError("the reason")
    assert names(tmp_path) == []


def test_a_renaming_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(OSError, match="x"), whole_file(tmp_path / "x") as part:
        part.write_text("new")
    assert names(tmp_path) == ["x"]


def test_a_block_that_writes_nothing_keeps_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "old"


def test_a_cleaning_that_fails_does_not_hide_the_reason(tmp_path):
    def hinder():
        (tmp_path / "x.part").unlink()
        (tmp_path / "x.part").mkdir()  # unlink refuses a folder

    with pytest.raises(ValueError, match="the reason"):
        write_and_fail(tmp_path / "x", error=ValueError("the reason"), meanwhile=hinder)


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / "x.part").write_text("long, from a killed process")
    write_text(tmp_path / "x", text="new")
    assert (tmp_path / "x").read_text() == "new"
    assert names(tmp_path) == ["x"]


def other_process(path, *, text):
    code = (
        "import sys, pathlib, prefgen.whole_file as w\n"
        "w.write_text(pathlib.Path(sys.argv[1]), text=sys.argv[2], shared=True)"
    )
    subprocess.run([sys.executable, "-c", code, str(path), text], check=True)


def test_two_writers_do_not_meet(tmp_path):
    """The other one begins and ends while ours is half way; the last to end wins."""
    path = tmp_path / "x"
    with whole_file(path, shared=True) as part:
        part.write_text("ours")
        other_process(path, text="theirs")
        assert path.read_text() == "theirs"
        assert part.read_text() == "ours"
    assert path.read_text() == "ours"
    assert names(tmp_path) == ["x"]


def test_a_writer_that_fails_leaves_the_file_of_the_other(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(
            path, error=KeyboardInterrupt(), shared=True, meanwhile=lambda: other_process(path, text="theirs")
        )
    assert path.read_text() == "theirs"
    assert names(tmp_path) == ["x"]


def test_json_has_the_form_that_is_asked_for(tmp_path):
    content = {"b": "ä", "a": [1]}
    path = tmp_path / "x.json"
    write_json(path, content=content)
    assert path.read_text(encoding="utf-8") == '{\n "b": "\\u00e4",\n "a": [\n  1\n ]\n}\n'
    write_json(path, content=content, indent=None, sort_keys=True, ensure_ascii=False, shared=True)
    assert path.read_text(encoding="utf-8") == '{"a": [1], "b": "ä"}\n'


def test_what_json_cannot_say_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, content=[1])
    for content, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error):
            write_json(path, content=content, allow_nan=False)
    assert json.loads(path.read_text()) == [1]
    assert names(tmp_path) == ["x.json"]


def test_it_imports_nothing_heavy():
    code = "import sys, prefgen.whole_file; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
