"""Which module may import which: the house's levels, read from the source; and that all modules import."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import prefgen
from prefgen.stages import STAGES

ROOT = Path(prefgen.__file__).parent
HEAVY = {"torch", "lightning", "transformers", "diffusers", "peft", "torchmetrics"}
PACKAGES = {"data", "models", "mmd", "evaluate"}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def parsed(path):
    """A file's tree without what stands under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    return tree


@cache
def imports(path, *, top_level_only=False):
    """Full names of what a file imports."""
    tree = parsed(path)
    found = set()
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def area(name):
    """``prefgen.stages.align.module`` -> what the rules below speak of."""
    parts = name.split(".")[1:]
    if not parts:
        return "errors"
    if parts[0] == "stages" and len(parts) >= 3:
        return "config" if parts[2] == "config" else f"stage {parts[1]}"
    if parts[0] == "stages" and len(parts) == 2 and parts[1] not in STAGES:
        return "base"  # what stages share
    if parts[:2] == ["study", "config"]:
        return "config"
    if parts[0] in ("config_keys", "config_mllm", "config_sections", "inputs", "stages"):
        return "config"
    if parts[0] in ("callbacks", "run_folder", "run_noise", "heap", "commands", "cli", "__main__"):
        return "run"
    return parts[0]


BASIC = {"errors", "schema", "lineage", "whole_file", "inside"}
CONFIG = {*BASIC, "config"}
ALLOWED = {
    "errors": {"errors"},
    "schema": BASIC,
    "lineage": BASIC,
    "whole_file": {"whole_file"},
    "inside": {"inside"},
    "config": CONFIG,
    "data": {*BASIC, "data"},
    "models": {*BASIC, "models"},
    "mmd": {"errors", "mmd"},
    "evaluate": {*BASIC, "evaluate", "mmd"},
    "checkpoint": {*BASIC, "checkpoint"},
    "base": {*CONFIG, *PACKAGES, "checkpoint", "base"},
    "study": {
        *CONFIG,
        *PACKAGES,
        "base",
        "precision",
        "study",
    },  # the evaluation: stages' files, never a stage's code
    "dials": {
        *CONFIG,
        *PACKAGES,
        "base",
        "study",
        "profile",
        "profile_math",
        "profile_batch",
        "taste",
        "painter",
        "dials",
    },
    "artefacts": {*BASIC, "artefacts"},
    "judgements": {*BASIC, "judgements"},
    "profile": {*BASIC, *PACKAGES, "checkpoint", "profile"},
    "profile_math": {*BASIC, "profile", "profile_math"},
    "ranking": {*BASIC, *PACKAGES, "profile", "ranking"},
    "taste": {*BASIC, *PACKAGES, "checkpoint", "profile", "profile_math", "taste"},
    "profile_batch": {*BASIC, *PACKAGES, "profile", "profile_math", "taste", "profile_batch"},
    "painter": {*BASIC, *PACKAGES, "profile", "artefacts", "painter"},
    "stock": {*BASIC, *PACKAGES, "profile", "artefacts", "painter", "stock"},
    "standalone": {"standalone"},  # copied beside exports: nothing of prefgen
    "model_card": {*BASIC, "data", "artefacts", "model_card"},
    "exporting": {
        *BASIC,
        *PACKAGES,
        "profile",
        "artefacts",
        "painter",
        "standalone",
        "model_card",
        "exporting",
    },
    "pipeline": {
        *BASIC,
        *PACKAGES,
        "profile",
        "ranking",
        "taste",
        "artefacts",
        "painter",
        "stock",
        "pipeline",
    },
}

LIBRARY = {
    "exporting",
    "model_card",
    "standalone",
    "stock",
    "profile",
    "profile_math",
    "profile_batch",
    "ranking",
    "taste",
    "painter",
    "pipeline",
}


def allowed(name):
    kind = area(name)
    if kind.startswith("stage "):
        return {*CONFIG, *PACKAGES, "checkpoint", "base", kind}
    return ALLOWED.get(kind)  # None: run, commands, testing may import all


@pytest.mark.parametrize("kind", sorted({area(name) for name in SOURCES}))
def test_import_direction(kind):
    for name in SOURCES:
        if area(name) == kind:
            assert_direction(name)


def assert_direction(name):
    rule = allowed(name)
    for target in imports(SOURCES[name]):
        if not target.startswith("prefgen"):
            continue
        inside = next((t for t in (target, target.rpartition(".")[0]) if t in SOURCES), None)
        assert inside, f"{name} imports {target}, which does not exist"
        assert area(inside) != "testing" or area(name) == "testing", f"{name} imports {inside}"
        if rule is not None:
            assert area(inside) in rule, f"{name} ({area(name)}) may not import {inside} ({area(inside)})"


LOADED_LATER = {"prefgen.run", "prefgen.callbacks", "prefgen.run_noise"}


def test_what_the_command_line_reads_is_light():
    for name in SOURCES:
        if area(name) not in {*CONFIG, "run"} or name in LOADED_LATER:
            continue
        heavy = {target.partition(".")[0] for target in imports(SOURCES[name], top_level_only=True)} & HEAVY
        assert not heavy, f"{name} imports {heavy}"


def test_the_library_knows_no_lightning():
    for name in SOURCES:
        if area(name) not in {*PACKAGES, *LIBRARY, "study"}:
            continue
        found = {target.partition(".")[0] for target in imports(SOURCES[name])}
        assert "lightning" not in found, name
        if area(name) == "mmd":
            assert not found & (HEAVY - {"torch"}), name


def test_the_command_line_loads_no_torch():
    code = "import sys, prefgen.cli, prefgen.config; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_module_imports():
    """In the process of the tests, where a warning is an error."""
    for name in SOURCES:
        if not name.endswith("__main__"):
            importlib.import_module(name)


LARGE = {
    "prefgen.data.agents.painters": 500,  # one short function per attribute value, and nothing else
    "prefgen.data.loader": 420,  # one class and its worker side, which must be read together
}


def test_files_stay_small():
    """A file over 350 lines needs a reason in LARGE; a function over 80 (docstring apart) wants splitting."""
    for name, path in SOURCES.items():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= LARGE.get(name, 350), f"{name}: {lines} lines"
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                code = node.body[1:] if ast.get_docstring(node) else node.body
                assert not code or node.end_lineno - code[0].lineno < 80, f"{name}.{node.name}"
