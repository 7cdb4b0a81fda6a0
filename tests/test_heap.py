"""Freed memory stays with the process, unless the user has said how it is to be."""

import subprocess
import sys

import pytest

from prefgen.heap import keep_freed_memory

# A large block is freed and asked for again: how many pages does the kernel have to clear the second time?
FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page takes one fault for 512
SIZE = 64 << 20
from prefgen.heap import keep_freed_memory
kept = keep_freed_memory()
b"x" * SIZE
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * SIZE
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
OTHERS = ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@pytest.fixture
def plain(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("MALLOC_") or name in OTHERS:
            monkeypatch.delenv(name)


def faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has mallopt")
def test_the_second_block_takes_the_pages_of_the_first(plain, monkeypatch):
    kept, count = faults()
    if not kept:
        pytest.skip("this C library has no mallopt")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")  # about something else, yet the user is at work there
    still, usual = faults()
    assert not still
    assert count < usual / 10


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_user_has_set_is_left_alone(plain, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert keep_freed_memory() is False


def test_other_systems_are_left_alone(plain, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
