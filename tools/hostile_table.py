"""Feeds prefgen broken and malicious inputs and prints the line each gets.

    python tools/hostile_table.py --out work/hostile.md

Each input meets the command, or the reader, that a user's would, in a process of its own with a time limit.
Exit
code 1 if one runs code, hangs, shows a traceback or an error of ours instead of a line, or is read as if it
were
good.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import prefgen.commands.data
import prefgen.commands.fit
import prefgen.data.verify
import prefgen.profile  # noqa: F401 - read once here, not in every child
from prefgen.cli import main as prefgen_main
from prefgen.errors import PrefgenError
from prefgen.testing.hostile import all_inputs
from prefgen.testing.hostile_case import MARK, Hostile
from prefgen.testing.verdict_table import VerdictTable


def attempt(case: Hostile, *, folder: Path, limit: float) -> tuple[str, str]:
    """(verdict, line) of one input: refused, or what is wrong with the answer."""
    folder.mkdir()
    log = folder.with_suffix(".log")
    child = os.fork()
    if child == 0:
        _child(case, folder=folder, log=log)
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "HANGS", f"not done after {limit:.0f} s"
        time.sleep(0.01)
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.startswith("prefgen: error: ")]
    line = lines[-1] if lines else text[-200:].replace("\n", " ")
    code = os.waitstatus_to_exitcode(status)
    if any(path.name == MARK for path in folder.rglob("*")):
        return "RAN CODE", line
    if "Traceback" in text:
        return "TRACEBACK", line
    if code == 0:
        return "READ", line
    return ("refused", line) if code == 2 and len(lines) == 1 else (f"EXIT {code}", line)


def _child(case: Hostile, *, folder: Path, log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(folder)
    code = 1
    try:
        what = case.make(folder)
        if callable(what):
            try:
                what()
                code = 0
            except PrefgenError as error:
                print(f"prefgen: error: {' '.join(str(error).split())}", file=sys.stderr)
                code = 2
        else:
            code = prefgen_main(what)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one input (60)")
    parser.add_argument("--every", type=int, default=1, help="only every so many inputs, for a try (1)")
    parser.add_argument("--out", type=Path, help="markdown file for the table")
    args = parser.parse_args()
    table = VerdictTable(kind="where", case="input", words="the line")
    print(table.head)
    with tempfile.TemporaryDirectory(prefix="prefgen-hostile-") as name:
        for number, case in enumerate(list(all_inputs())[:: args.every], start=1):
            verdict, line = attempt(case, folder=Path(name) / f"{number:03d}", limit=args.limit)
            shown = (
                line.removeprefix("prefgen: error: ").replace(f"{name}/{number:03d}", "..").replace("|", "/")
            )
            words = "".join(c if c.isprintable() else "?" for c in case.name[:60]).replace("|", "/")
            print(table.add(kind=case.kind, case=words, verdict=verdict, words=shown[:200]), flush=True)
    print(table.close("inputs", out=args.out))
    return 1 if table.counts.total() - table.counts["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
