"""Random and mutated bytes for every kind of file a stranger may hand over: a PrefgenError or nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prefgen.testing.fuzz import TARGETS, feed, good

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"
QUICK = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", list(TARGETS))
def test_good_bytes_are_taken(name):
    assert feed(name, good(name))


@pytest.mark.parametrize("name", list(TARGETS))
def test_mutated_bytes(name):
    start = good(name)
    edits = st.lists(
        st.tuples(
            st.integers(0, len(start)),
            st.sampled_from(["replace", "insert", "delete"]),
            st.binary(max_size=9),
        ),
        min_size=1,
        max_size=4,
    )

    @QUICK
    @given(edits)
    @example([(0, "insert", b"[" * 9)])
    def check(changes):
        data = bytearray(start)
        for place, how, piece in changes:
            if how == "insert":
                data[place:place] = piece
            else:
                data[place : place + len(piece)] = piece if how == "replace" else b""
        feed(name, bytes(data))

    check()


@pytest.mark.parametrize("name", list(TARGETS))
def test_random_bytes(name):
    @QUICK
    @given(st.binary(max_size=300))
    @example(b"")
    @example(b"[" * 50_000)
    @example(b"{a: " * 20_000)
    @example(b"\xff\xfe\x00")
    def check(data):
        feed(name, data)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TARGETS))
def test_coverage_guided(name):
    pytest.importorskip("atheris")
    words = [sys.executable, str(TOOL), name, "-runs=20000", "-max_total_time=60"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
