"""The thresholds of the demo: each kind of rule kept and broken, and what is absent never passes."""

import importlib.util
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check_demo():
    spec = importlib.util.spec_from_file_location("check_demo", ROOT / "tools" / "check_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METRICS = {
    "oracle": 0.9,
    "vqa": {"mean": 0.8, "low": 0.75, "high": 0.85},
    "blind": {"low": 0.45, "high": 0.55},
}


@pytest.mark.parametrize(
    ("path", "rule", "kept"),
    [
        ("vqa.mean", {"min": 0.8}, True),
        ("vqa.mean", {"min": 0.81}, False),
        ("vqa.mean", {"max": 0.7}, False),
        ("vqa.mean", {"min": 0.85, "of": "oracle"}, True),
        ("vqa.mean", {"min": 0.95, "of": "oracle"}, False),
        ("vqa.mean", {"min": 0.5, "of": "nothing"}, False),
        ("blind", {"covers": 0.5}, True),
        ("vqa", {"covers": 0.5}, False),
        ("absent", {"covers": 0.5}, False),
        ("absent.mean", {"min": 0}, False),
        ("vqa", {"min": 0}, False),
    ],
)
def test_rules(check_demo, path, rule, kept):
    assert check_demo.judge(METRICS, path=path, rule=rule)[0] is kept


def test_shipped_thresholds_are_rules():
    path = ROOT / "configs" / "mini" / "demo_thresholds.yaml"
    for rule in yaml.safe_load(path.read_text(encoding="utf-8")).values():
        assert rule.keys() <= {"min", "max", "of", "covers"}
        assert rule.keys() & {"min", "max", "covers"}
