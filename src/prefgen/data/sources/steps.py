"""Names of the cleaning steps and of the importers, for the command line: standard library only."""

from __future__ import annotations

from prefgen.errors import ConfigError

STEPS = {
    "ties": "judgements that prefer neither of two images (off: a tie stops the import)",
    "broken-images": "images that are missing, too large or do not decode (off: one stops the import)",
    "contradictions": "an image that one user both likes and dislikes: all of that user's judgements of it",
    "exact-duplicates": "an image judged again by the same user with the same verdict: the first stays",
    "near-duplicates": "an image that looks like an earlier one of the same user and side: the first stays",
    "across-splits": "an image judged by users of several splits: kept in the split where it occurs most",
    "few-judgements": "users with fewer judgements left than --min-judgements",
}
"""Every step with what it removes, in the order they run."""

DEFAULT_NEAR_DISTANCE = 4
DEFAULT_MIN_JUDGEMENTS = 4

IMPORTERS = {
    "prefbench": "PrefBench: json/, pkl/ and the tar parts of its images",
    "pickapic": "Pick-a-Pic v1 or v2: a folder of parquet files (needs pyarrow)",
    "learn-user-pref": "learn-user-pref: pickled data frames, read without executing them",
    "pipbench": "PIPBench: metadata.json and its images",
    "folder": "folders: USER/liked, USER/disliked, or one liked/, disliked/; prompts.csv may be beside them",
    "table": "a CSV or JSONL file: user_id, image, liked, and prompt if known",
}
"""Every importer with what it reads."""


def parse_steps(text: str) -> tuple[str, ...]:
    """``--clean``: names with commas, ``none``, or ``all``, in running order.

    Raises:
        ConfigError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(STEPS)
    if names == ["none"]:
        return ()
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        got = unknown[0] if unknown else text
        raise ConfigError(
            f"--clean: unknown step {got!r}; expected names with commas out of {', '.join(STEPS)}, or none"
        )
    return tuple(step for step in STEPS if step in names)
