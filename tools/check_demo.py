"""Compare the figures of a demo with the thresholds kept in the repository; exit 1 where one falls short.

    python tools/check_demo.py work/demo/report/metrics.json configs/mini/demo_thresholds.yaml

A threshold is a dotted path into metrics.json and conditions on what stands there:
``{min: 0.8}``, ``{max: 0.1}``, ``{min: 0.85, of: other.path}`` (a share of another figure), and
``{covers: 0.5}`` for an entry with ``low`` and ``high``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml


def look_up(metrics: dict[str, Any], path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    value: Any = metrics
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def judge(metrics: dict[str, Any], *, path: str, rule: dict[str, Any]) -> tuple[bool, str]:
    """Whether a figure keeps its rule, and the figure and rule in words."""
    value = look_up(metrics, path)
    if "covers" in rule:
        low, high = look_up(metrics, f"{path}.low"), look_up(metrics, f"{path}.high")
        if low is None or high is None:
            return False, f"{path} has no low and high"
        return low <= rule["covers"] <= high, f"{path} [{low:.3f}, {high:.3f}] covers {rule['covers']}"
    if not isinstance(value, int | float):
        return False, f"{path} is missing or no number"
    scale, words = 1.0, ""
    if "of" in rule:
        base = look_up(metrics, rule["of"])
        if not isinstance(base, int | float):
            return False, f"{rule['of']} is missing or no number"
        scale, words = float(base), f" x {rule['of']} ({base:.3f})"
    kept, text = True, f"{path} = {value:.3f}"
    if "min" in rule:
        kept, text = kept and value >= rule["min"] * scale, f"{text} >= {rule['min']}{words}"
    if "max" in rule:
        kept, text = kept and value <= rule["max"] * scale, f"{text} <= {rule['max']}{words}"
    return kept, text


def main() -> int:
    """Print a line per threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("thresholds", type=Path)
    args = parser.parse_args()
    metrics = json.loads(args.metrics.read_text(encoding="utf-8"))
    rules = yaml.safe_load(args.thresholds.read_text(encoding="utf-8"))
    fallen_short = 0
    for path, rule in rules.items():
        kept, text = judge(metrics, path=path, rule=rule)
        fallen_short += not kept
        print(f"{'ok  ' if kept else 'FAIL'} {text}")
    print(f"{len(rules) - fallen_short} of {len(rules)} thresholds kept")
    return 1 if fallen_short else 0


if __name__ == "__main__":
    sys.exit(main())
