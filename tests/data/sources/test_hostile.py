"""Sources that try to run code, to read elsewhere, or are damaged: one line each, and nothing happens."""

import os
import pickle
import tarfile

import pytest

from prefgen.data.sources import files
from prefgen.data.sources.base import Unusable
from prefgen.errors import DataError


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


class Evaluates:
    def __reduce__(self):
        return eval, ("open('hacked', 'w')",)


def build_on_a_function():
    """Sets an attribute of one of our own functions."""
    return b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n}\x8c\x01a\x8c\x01bsb."


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "hacked").exists()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("evil", [Evil(), Evaluates(), {"0": [("a", "b", "c"), Evil()]}])
@pytest.mark.parametrize("name", ["prefbench", "learn-user-pref"])
def test_pickles_that_run_code(tmp_path, make, tools, name, evil):
    source = make(name)
    target = next(source.rglob("*.pkl"))
    target.write_bytes(pickle.dumps(evil))
    with pytest.raises(DataError, match=r"the pickle asks for \w+\.\w+, which could run code") as error:
        tools.run(name, source, tmp_path / "out")
    assert target.name in one_line(error)


@pytest.mark.parametrize("data", [build_on_a_function(), b"\x80\x04\x82\x01.", b"\x80\x04\x8c\x01aQ."])
def test_other_ways_into_a_frame(tmp_path, make, tools, data):
    from prefgen.data.sources import frames

    source = make("learn-user-pref")
    next(source.glob("*.pkl")).write_bytes(data)
    with pytest.raises(DataError, match="which could run code") as error:
        tools.run("learn-user-pref", source, tmp_path / "out")
    one_line(error)
    assert not vars(frames._reconstruct)


@pytest.mark.parametrize("name", ["prefbench", "learn-user-pref"])
@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"no pickle", pickle.dumps([1, 2]), b"\x80\x04\x8e" + b"\xff" * 8]
)
def test_damaged_pickles(tmp_path, make, tools, name, data):
    source = make(name)
    next(source.rglob("*.pkl")).write_bytes(data)
    with pytest.raises(DataError, match=r"damaged or foreign|expected a dict|no pandas frame") as error:
        tools.run(name, source, tmp_path / "out")
    one_line(error)


def member(name, *, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 3 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../outside.png"), "is refused; paths must be relative"),
        (member("/etc/outside.png"), "is refused; paths must be relative"),
        (member("a\\b.png"), "is refused; paths must be relative"),
        (member("x.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), "link or a device"),
        (member("x.png", kind=tarfile.LNKTYPE, link="../x"), "link or a device"),
        (member("x.png", kind=tarfile.FIFOTYPE), "link or a device"),
    ],
)
def test_tar_members_that_lead_out(tmp_path, make, tools, info, message):
    source = make("prefbench", extra=[info])
    with pytest.raises(DataError, match=message) as error:
        tools.run("prefbench", source, tmp_path / "out")
    one_line(error)


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "C:\\x.png", "http://x/y.png", "link.png", ""]
)
def test_tables_that_lead_out(tmp_path, make, tools, path):
    (tmp_path / "secret.png").write_bytes(tools.picture(1))
    source = make("table")
    (source.parent / "link.png").symlink_to(tmp_path / "secret.png")
    source.write_text(f"user_id,image,liked\nu,{path},yes\n")
    with pytest.raises(DataError, match=r"row 1: .*(refused|leads outside)") as error:
        tools.run("table", source, tmp_path / "out")
    one_line(error)


def test_folders_that_lead_out(tmp_path, make, tools):
    source = make("folder")
    other = tmp_path / "other"
    (other / "liked").mkdir(parents=True)
    (other / "liked" / "0.png").write_bytes(tools.picture(1))
    (source / "p9").symlink_to(other)
    with pytest.raises(DataError, match="leads outside"):
        tools.run("folder", source, tmp_path / "out")


def test_fifos_and_giants_are_counted_not_read(tmp_path, make, monkeypatch):
    source = make("table").parent
    os.mkfifo(source / "fifo.png")
    assert files.read_image("fifo.png", root=source, where="x") == Unusable("not a regular file")
    assert files.read_image("none.png", root=source, where="x") == Unusable("missing")
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 10)
    assert files.read_image("pics/0.png", root=source, where="x") == Unusable("too large")


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("table", "judged.csv", "user_id,image\n", "no column 'liked'; it has: user_id, image"),
        (
            "table",
            "judged.csv",
            "user_id,image,liked\nu,pics/0.png,maybe\n",
            "liked is 'maybe'; expected one of",
        ),
        ("pipbench", "metadata.json", '[{"id": 1}]', "record 0: prompt must be text, got NoneType"),
        ("pipbench", "metadata.json", '[{"id": 1}', "item 1 is not whole json"),
        ("pipbench", "metadata.json", '[{"id": 1, ', "item 0 is not whole json"),
        (
            "prefbench",
            "json/coco.json",
            '[{"id": "0", "positive_img": ["a"]}]',
            "negative_img must be a list",
        ),
    ],
)
def test_broken_text(tmp_path, make, tools, name, file, text, message):
    source = make(name)
    (source.parent / file if name == "table" else source / file).write_text(text)
    with pytest.raises(DataError, match="^[^\n]*$") as error:
        tools.run(name, source, tmp_path / "out")
    if "item 1" in message:  # the first record is looked at before the second
        message = "record 0: prompt must be text"
    assert message in one_line(error)


@pytest.mark.parametrize("name", ["folder", "pipbench", "prefbench", "pickapic", "learn-user-pref", "table"])
def test_another_layout(tmp_path, make, name):
    from prefgen.data.sources.catalogue import open_source

    if name == "pickapic":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(DataError, match="expected"):
            open_source(name, path=path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    import sys

    from prefgen.data.sources.catalogue import open_source

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow; install it with: pip install 'prefgen\[import\]'"):
        open_source("pickapic", path=tmp_path)


def test_a_file_that_is_no_parquet(tmp_path, make):
    from prefgen.data.sources.catalogue import open_source

    source = make("pickapic")
    next(source.rglob("*.parquet")).write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="no parquet file"):
        open_source("pickapic", path=source)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("text", ['[{"a": "x, ]["}, {"b": [1]},\n {}]', '{"a": "x, ]["}\n{"b": [1]}\n{}\n'])
def test_json_lists_as_a_stream(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    (tmp_path / "x.json").write_text(text)
    items = list(files.json_list(tmp_path / "x.json"))
    assert [(number, item) for number, item, _ in items] == [(0, {"a": "x, ]["}), (1, {"b": [1]}), (2, {})]
    assert [done for *_, done in items] == sorted(done for *_, done in items)


def test_joined_files_read_as_one(tmp_path):
    import io

    for i, text in enumerate((b"abc", b"", b"defgh")):
        (tmp_path / f"part-{i}").write_bytes(text)
    parts = files.natural_order([tmp_path / "part-2", tmp_path / "part-0", tmp_path / "part-1"])
    with io.BufferedReader(files.JoinedFile(parts), buffer_size=2) as joined:
        assert joined.read(5) == b"abcde"
        joined.seek(2)
        assert joined.read() == b"cdefgh"
    assert [path.name for path in files.natural_order([tmp_path / "p10", tmp_path / "p9"])] == ["p9", "p10"]
