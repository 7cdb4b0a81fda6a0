"""Coverage-guided fuzzing of prefgen's readers with atheris (``pip install atheris``).

    python tools/fuzz.py history -runs=100000        (targets: see prefgen.testing.fuzz.TARGETS)

Further words are libFuzzer's. It stops at the first input that brings out anything but a PrefgenError and
writes
that input to a file ``crash-...``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["prefgen"]):
    from prefgen.testing.fuzz import TARGETS, feed, good


def main() -> None:
    """Fuzz the target named by the first word."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: fuzz.py TARGET [libFuzzer options]; targets: {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp(prefix=f"prefgen-corpus-{name}-"))
    (corpus / "good").write_bytes(good(name))
    atheris.Setup([*sys.argv, str(corpus)], lambda data: feed(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
