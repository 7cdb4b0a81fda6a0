"""Broken and malicious inputs: one line each, no code run. All of them with tools/hostile_table.py."""

import os
import signal

import pytest

from prefgen.cli import main
from prefgen.errors import PrefgenError
from prefgen.testing.hostile import all_inputs
from prefgen.testing.hostile_case import MARK

CASES = list(all_inputs())


@pytest.fixture(autouse=True)
def _no_longer_than_a_minute():
    def late(number, frame):
        raise AssertionError("hangs")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def check(case, *, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what = case.make(tmp_path)
    if callable(what):
        with pytest.raises(PrefgenError) as caught:
            what()
        line = str(caught.value)
        assert "\n" not in line
    else:
        code = main(what)
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("prefgen: error: ")]
        assert (code, len(lines)) == (2, 1), f"{case.kind}, {case.name}: {code} {errors[-300:]}"
        assert "Traceback" not in errors
    assert not list(tmp_path.rglob(MARK)), "code was run"
    assert not (tmp_path / "out" / "index.json").exists()


def test_there_are_enough():
    assert len(CASES) >= 150
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: f"{case.kind}: {case.name}"[:60])
def test_some_inputs(case, tmp_path, capsys, monkeypatch):
    check(case, tmp_path=tmp_path, capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}"[:60])
def test_all_inputs(case, tmp_path, capsys, monkeypatch):
    check(case, tmp_path=tmp_path, capsys=capsys, monkeypatch=monkeypatch)


def test_the_inputs_can_run_code(tmp_path, monkeypatch):
    """What the pickles hold would leave the mark: the test above can fail."""
    import pickle

    from prefgen.testing.hostile_case import EVIL

    monkeypatch.chdir(tmp_path)
    assert pickle.loads(EVIL) == 0
    assert os.path.exists(MARK)
