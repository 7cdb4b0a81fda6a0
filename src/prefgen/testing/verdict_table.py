"""A Markdown table of cases and what became of each, a line at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


class VerdictTable:
    """Rows of number, kind, case, verdict and words.

    Attributes:
        counts: rows by verdict.
    """

    def __init__(self, *, kind: str, case: str, words: str) -> None:
        """Head the columns; number and outcome have names of their own."""
        self.counts: Counter[str] = Counter()
        self._lines = [f"| # | {kind} | {case} | outcome | {words} |", "|---|---|---|---|---|"]

    @property
    def head(self) -> str:
        """The first two lines."""
        return "\n".join(self._lines[:2])

    def add(self, *, kind: str, case: str, verdict: str, words: str) -> str:
        """Count one case and return its line; texts hold no ``|``."""
        self.counts[verdict] += 1
        self._lines.append(f"| {self.counts.total()} | {kind} | {case} | {verdict} | {words} |")
        return self._lines[-1]

    def close(self, what: str, *, out: Path | None) -> str:
        """Write the whole to ``out``, if given, and return its last line: the counts."""
        counted = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        self._lines.append(f"\n{self.counts.total()} {what}: {counted}")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        return self._lines[-1]
