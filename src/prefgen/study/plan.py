"""A study as a file: which runs of which commands, under which names, for which tables. No torch here.

A step is the words of a prefgen command; ``{run}``, ``{runs}``, ``{name}``, ``{seed}``, ``{plan}`` and the
file's own ``words`` are put in. Nothing else is known about a run, so whatever the command line can do a
study can.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from prefgen.errors import ConfigError

Table = Literal["none", "main", "ablation", "curve"]
TABLES: tuple[str, ...] = get_args(Table)
PLAN_VERSION = 1

_RUN_KEYS = {"name", "seeds", "steps", "table", "group", "words", "curve", "x", "trial"}
_PLAN_KEYS = {"version", "about", "words", "runs", "claims", "stages", "presets"}
_DEPTH = 5

PLAIN_PRESET = "mini"
"""The preset that steps are written for."""

DATA_RUN = "data"
"""Name of the run that makes the histories, into its folder ``shards``."""

_CONFIGURED = ("fit", "validate", "test", "predict", "evaluate")
"""Commands that take ``--preset``."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting chosen before a run: the same budget for everyone, on validation users.

    Attributes:
        name: what is tried, for the report, e.g. ``optim.learning_rate``.
        values: as they are written in a command; ``{value}`` in the steps.
        steps: commands run once for each value.
        metrics: json file each value leaves behind.
        figure: where the figure stands in it, levels parted by ``|``, e.g. ``fit|val/loss``.
        best: which end is taken; the choice is ``{best}`` in the run's own steps.
    """

    name: str
    values: tuple[str, ...]
    steps: tuple[str, ...]
    metrics: str
    figure: str
    best: Literal["min", "max"] = "min"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one seed.

    Attributes:
        name: of the run without its seed.
        folder: name of its folder: the name, and the seed where there are several.
        seed: the seed.
        steps: commands, words not put in yet.
        table: in which table of the report it stands.
        group: heading inside the table.
        words: what is different about it.
        curve: for ``table: curve``, what is varied.
        x: its value there.
        trial: a choice before the steps; None for none.
    """

    name: str
    folder: str
    seed: int
    steps: tuple[str, ...]
    table: Table = "none"
    group: str = ""
    words: str = ""
    curve: str = ""
    x: float = 0.0
    trial: Trial | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper and the comparison that speaks about it: ``better`` should beat ``than``."""

    words: str
    better: str
    than: str


@dataclass(frozen=True, kw_only=True)
class PlanPreset:
    """The same study with another preset's models, on histories that exist already.

    Attributes:
        about: one line: which models, what data.
        words: placeholders that differ, such as numbers of steps and users.
    """

    about: str
    words: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole study.

    Attributes:
        path: the file.
        about: one line.
        words: placeholders of its own.
        runs: in the order they are run.
        claims: what the ablations are held against.
        stages: heading of the cost table -> folder of a run or of a stage in one, for its parameters.
        presets: other presets that the study can be run with.
        preset: the one it is run with.
        shards: histories that exist already; run ``data`` is then left out.
    """

    path: Path
    about: str
    words: Mapping[str, str]
    runs: tuple[Run, ...]
    claims: tuple[Claim, ...] = ()
    stages: Mapping[str, str] | None = None
    presets: Mapping[str, PlanPreset] = field(default_factory=dict)
    preset: str = PLAIN_PRESET
    shards: Path | None = None

    def commands(self, run: Run, *, work: Path, values: Mapping[str, str] | None = None) -> list[list[str]]:
        """The words of each step; ``values`` adds placeholders such as ``best``."""
        return [self._command(step, run=run, work=work, values=values or {}) for step in run.steps]

    def trial_commands(self, run: Run, *, work: Path, value: str) -> list[list[str]]:
        """The words of each step of a run's trial at one value."""
        assert run.trial is not None
        return [self._command(step, run=run, work=work, values={"value": value}) for step in run.trial.steps]

    def place(self, text: str, *, run: Run, work: Path, values: Mapping[str, str] | None = None) -> Path:
        """A path with its placeholders put in."""
        return Path(" ".join(self._command(text, run=run, work=work, values=values or {})))

    def _command(self, step: str, *, run: Run, work: Path, values: Mapping[str, str]) -> list[str]:
        runs = work / "runs"
        known = {
            **{name: str(text) for name, text in self.words.items()},
            "run": str(runs / run.folder), "runs": str(runs), "name": run.name, "seed": str(run.seed),
            "plan": str(self.path.parent), **values,
        }  # fmt: skip
        # Words are put in before the line is cut, paths after it, since those may hold blanks.
        line = step
        for _ in range(_DEPTH):
            before = line
            for name, text in self.words.items():
                line = line.replace(f"{{{name}}}", str(text))
            if line == before:
                break
        try:
            return self._adapted([word.format(**known) for word in shlex.split(line)], runs=runs)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"{self.path}: run {run.name}: no placeholder {error} in {step!r}; known: "
                f"{', '.join(sorted({*known, 'value', 'best'}))}"
            ) from None

    def _adapted(self, words: list[str], *, runs: Path) -> list[str]:
        """A command for the preset and the shards at hand: the steps are written for the plain ones."""
        if self.shards is not None:
            made = str(runs / DATA_RUN / "shards")
            words = [word.replace(made, str(self.shards)) for word in words]
        if self.preset == PLAIN_PRESET:
            return words
        words = [word.replace(f"/configs/{PLAIN_PRESET}/", f"/configs/{self.preset}/") for word in words]
        if words and words[0] in _CONFIGURED and not {"--preset", "--config"} & set(words):
            words[1:1] = ["--preset", self.preset]
        return words


def read_plan(path: Path, *, preset: str = PLAIN_PRESET, shards: Path | None = None) -> Plan:
    """Read and check a plan.

    Args:
        path: the file.
        preset: whose models the study is run with.
        shards: histories that exist already, instead of those that run ``data`` would make.

    Raises:
        ConfigError: unreadable, another version, an unknown key or table, a name twice, a claim about a run
            that is not there, a preset that the plan does not name, or one without shards.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read plan {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or content.get("version") != PLAN_VERSION:
        raise ConfigError(f"{path}: expected a mapping with version: {PLAN_VERSION}")
    _check_keys(content, known=_PLAN_KEYS, where=str(path))
    runs = [run for record in content.get("runs", []) for run in _runs(record, where=str(path))]
    folders = [run.folder for run in runs]
    twice = next((name for name in folders if folders.count(name) > 1), None)
    if twice or not runs:
        raise ConfigError(f"{path}: run {twice!r} stands there twice" if twice else f"{path}: no runs")
    names = {run.name for run in runs}
    claims = tuple(Claim(**record) for record in content.get("claims", []))
    for claim in claims:
        for name in (claim.better, claim.than):
            if name not in names:
                raise ConfigError(f"{path}: claim {claim.words!r} speaks of run {name!r}, which is not there")
    presets = _presets(content.get("presets", {}), where=str(path))
    words, about = dict(content.get("words", {})), str(content.get("about", ""))
    if preset != PLAIN_PRESET:
        if preset not in presets:
            raise ConfigError(
                f"{path} cannot be run with preset {preset!r}; presets: {', '.join((PLAIN_PRESET, *presets))}"
            )
        if shards is None:
            raise ConfigError(
                f"preset {preset} works on histories of yours; pass --shards DIR, as 'prefgen data build' "
                "makes it"
            )
        words |= presets[preset].words
        about = f"{about.removesuffix(f', {PLAIN_PRESET} preset')}; {presets[preset].about}"
    return Plan(
        path=path,
        about=about,
        words=words,
        runs=tuple(run for run in runs if shards is None or run.name != DATA_RUN),
        claims=claims,
        stages=content.get("stages"),
        presets=presets,
        preset=preset,
        shards=shards,
    )


def _presets(record: Any, *, where: str) -> dict[str, PlanPreset]:
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: presets must map names to about and words, got {str(record)[:80]}")
    found = {}
    for name, one in record.items():
        if not isinstance(one, dict) or not {"about", "words"} <= set(one):
            raise ConfigError(f"{where}: preset {name} needs about and words")
        _check_keys(one, known={"about", "words"}, where=f"{where}: preset {name}")
        found[str(name)] = PlanPreset(about=str(one["about"]), words=dict(one["words"]))
    return found


def _runs(record: Any, *, where: str) -> list[Run]:
    if not isinstance(record, dict) or not {"name", "steps"} <= set(record):
        raise ConfigError(f"{where}: a run needs name and steps, got {str(record)[:80]}")
    _check_keys(record, known=_RUN_KEYS, where=f"{where}: run {record['name']}")
    table = record.get("table", "none")
    if table not in TABLES:
        raise ConfigError(f"{where}: run {record['name']}: table {table!r} is not one of {', '.join(TABLES)}")
    seeds = record.get("seeds")
    trial = record.get("trial")
    shared: dict[str, Any] = {
        "name": str(record["name"]),
        "steps": tuple(str(step) for step in record["steps"]),
        "table": table,
        "group": str(record.get("group", "")),
        "words": str(record.get("words", "")),
        "curve": str(record.get("curve", "")),
        "x": float(record.get("x", 0)),
        "trial": None if trial is None else _trial(trial, where=f"{where}: run {record['name']}"),
    }
    if seeds is None:
        return [Run(**shared, folder=shared["name"], seed=0)]
    return [Run(**shared, folder=f"{shared['name']}-{seed}", seed=int(seed)) for seed in seeds]


def _trial(record: Any, *, where: str) -> Trial:
    needed = {"name", "values", "steps", "metrics", "figure"}
    if not isinstance(record, dict) or not needed <= set(record):
        raise ConfigError(f"{where}: a trial needs {', '.join(sorted(needed))}")
    _check_keys(record, known={*needed, "best"}, where=where)
    best = record.get("best", "min")
    if best not in ("min", "max"):
        raise ConfigError(f"{where}: best must be min or max, got {best!r}")
    return Trial(
        name=str(record["name"]),
        values=tuple(str(value) for value in record["values"]),
        steps=tuple(str(step) for step in record["steps"]),
        metrics=str(record["metrics"]),
        figure=str(record["figure"]),
        best=best,
    )


def _check_keys(record: Mapping[str, Any], *, known: set[str], where: str) -> None:
    unknown = sorted(set(record) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
