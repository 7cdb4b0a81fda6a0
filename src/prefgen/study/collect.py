"""From the runs of a plan to ``study.json``: pooled over seeds, paired by user, many tests corrected for."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefgen.errors import DataError
from prefgen.evaluate.alignment import bootstrap
from prefgen.evaluate.comparing import Comparison, compare, corrected
from prefgen.evaluate.preference import share_of
from prefgen.study.conditions import in_order
from prefgen.study.costs import costs, parameters, trials, versions
from prefgen.study.plan import Plan, Run
from prefgen.study.runner import read_book
from prefgen.study.stages import read_json

STUDY_VERSION = 1
REPORT = "report"
"""Folder of an evaluation inside a run."""

NUM_RESAMPLES = 2000
FIDELITY_LOSS = 0.05
"""The study's own bar: at most this share of prompt fidelity may be lost."""

NUM_WORST = 6
"""Users in the failure gallery."""

SEES_TRUTH = ("words", "real")
"""Conditions that see the true attributes or are real drawings: shown, but no rivals."""


Table = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One finished run with an evaluation.

    Attributes:
        run: which.
        metrics: its metrics.json.
        users: user ids with their prompts, in order: what must be equal to be paired.
        tables: figure -> condition -> (U,).
    """

    run: Run
    metrics: Mapping[str, Any]
    users: tuple[tuple[str, tuple[str, ...]], ...]
    tables: Mapping[str, Mapping[str, Table]]


def collect(plan: Plan, *, work: Path, seed: int = 0) -> dict[str, Any]:
    """Everything the report shows, as plain json.

    Args:
        plan: the study.
        work: its folder.
        seed: of the intervals.

    Raises:
        DataError: no run of the main table is finished.
    """
    found = {run.folder: read_run(run, work=work) for run in plan.runs if run.table != "none"}
    missing = [name for name, one in found.items() if one is None]
    known = [one for one in found.values() if one is not None]
    main = [one for one in known if one.run.table == "main"]
    if not main:
        raise DataError(
            f"no run of the main table is finished in {work}/runs; run 'prefgen evaluate study --plan "
            f"{plan.path} --work {work}'"
        )
    ablations = [one for one in known if one.run.table == "ablation"]
    return {
        "version": STUDY_VERSION,
        "about": plan.about,
        "preset": plan.preset,
        "absent": absent(plan),
        "seeds": [one.run.seed for one in main],
        "num_users": len(main[0].users),
        "versions": versions(),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "main": main_table(main, seed=seed),
        "ablations": ablation_table(ablations, main=main, seed=seed),
        "claims": claims(plan, known=known, seed=seed),
        "curves": curves([one for one in known if one.run.table == "curve"], seed=seed),
        "structure": main[0].metrics.get("extra", {}).get("structure", {}),
        "rivals": main[0].metrics.get("extra", {}).get("conditions", {}),
        "mllm_judge": main[0].metrics.get("extra", {}).get("mllm_judge", {}),
        "probe": main[0].metrics.get("probe", {}),
        "trials": trials(plan, work=work),
        "costs": costs(plan, work=work),
        "parameters": parameters(plan, work=work),
        "worst": worst_users(main),
        "missing": missing,
    }


def absent(plan: Plan) -> list[dict[str, str]]:
    """Presets whose numbers are not in this report, each with the command that makes them."""
    rows = []
    for name, preset in plan.presets.items():
        if name != plan.preset:
            command = (
                f"prefgen evaluate study --plan {plan.path} --work work/{name}/study --preset {name} "
                f"--shards work/{name}/shards"
            )
            rows.append({"preset": name, "about": preset.about, "command": command})
    return rows


def worst_users(main: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Users by what their own pictures gained over the base model's, mean over seeds, worst first."""
    own, base = (pooled(main, figure="utility", condition=name) for name in ("own", "base"))
    assert own is not None
    assert base is not None
    gains = own - base
    return [
        {"row": int(i), "user_id": main[0].users[int(i)][0], "gain": float(gains[i])}
        for i in np.argsort(gains, kind="stable")[:NUM_WORST]
    ]


def read_run(run: Run, *, work: Path) -> Evaluated | None:
    """The evaluation of a finished run; None where it is not finished.

    Raises:
        DataError: it is finished, but its evaluation wrote no users.json (``extra.figures=true``).
    """
    folder = work / "runs" / run.folder
    if not read_book(folder).get("finished"):
        return None
    metrics, users = (read_json(folder / REPORT / name) for name in ("metrics.json", "users.json"))
    if metrics is None or users is None:
        raise DataError(
            f"{folder / REPORT} lacks metrics.json or users.json; the plan's evaluate needs "
            "extra.figures=true and out={run}/report"
        )
    return Evaluated(
        run=run,
        metrics=metrics,
        users=tuple(
            (name, tuple(prompts)) for name, prompts in zip(users["users"], users["prompts"], strict=True)
        ),
        tables={
            figure: {
                name: np.array([np.nan if value is None else value for value in values], dtype=np.float64)
                for name, values in rows.items()
            }
            for figure, rows in users["tables"].items()
        },
    )


def pooled(runs: Sequence[Evaluated], *, figure: str, condition: str) -> Table | None:
    """(U,) a figure averaged over the seeds, user by user; None where a run lacks it.

    Raises:
        DataError: the runs were evaluated on different users or prompts.
    """
    for one in runs[1:]:
        if one.users != runs[0].users:
            raise DataError(
                f"runs {runs[0].run.folder} and {one.run.folder} were evaluated on different users or "
                "prompts; give their evaluations one seed and one evaluate.num_users"
            )
    rows = [one.tables.get(figure, {}).get(condition) for one in runs]
    if any(row is None for row in rows):
        return None
    mean: Table = np.mean([row for row in rows if row is not None], axis=0)
    return mean


def _estimate(values: Table | None, *, seed: int) -> dict[str, Any] | None:
    if values is None:
        return None
    known = values[~np.isnan(values)]
    return asdict(bootstrap(known, seed=seed, draws=NUM_RESAMPLES)) if known.size else None


def main_table(runs: Sequence[Evaluated], *, seed: int) -> dict[str, Any]:
    """Every condition's figures, own against each of them, and the verdict on the study's claim."""
    names = in_order(runs[0].metrics["utility"])
    figures = [figure for figure in runs[0].tables if figure != "own_wins"]
    rows: dict[str, Any] = {}
    for name in names:
        rows[name] = {
            figure: _estimate(pooled(runs, figure=figure, condition=name), seed=seed) for figure in figures
        }
        rows[name]["own_wins"] = _estimate(pooled(runs, figure="own_wins", condition=name), seed=seed)
        rows[name]["by_seed"] = [
            float(np.nanmean(one.tables["utility"][name])) for one in runs if name in one.tables["utility"]
        ]
        for kind in ("sets", "elo"):
            rows[name] |= _mean_over_seeds(runs, kind=kind, condition=name)
    against = _against(runs, names=names, seed=seed)
    own, base = (pooled(runs, figure="prompt_fidelity", condition=name) for name in ("own", "base"))
    assert own is not None
    assert base is not None
    kept = share_of(own, base, seed=seed, num_resamples=NUM_RESAMPLES)
    return {
        "conditions": rows,
        "own_minus": {name: asdict(one) for name, one in against.items()},
        "fidelity_kept": asdict(kept),
        "verdict": verdict(against, kept=kept.mean),
    }


def _mean_over_seeds(runs: Sequence[Evaluated], *, kind: str, condition: str) -> dict[str, float | None]:
    """Figures of whole sets, for which there is nothing to pair: the mean over seeds."""
    extras = [one.metrics.get("extra", {}).get(kind, {}) for one in runs]
    if kind == "elo":
        values = [extra[condition]["mean"] for extra in extras if condition in extra]
        return {"elo": float(np.mean(values)) if values else None}
    found: dict[str, float | None] = {}
    for figure in ("fid", "kid", "cmmd"):
        values = [extra[figure][condition]["mean"] for extra in extras if condition in extra.get(figure, {})]
        found[figure] = float(np.mean(values)) if values else None
    return found


def _against(runs: Sequence[Evaluated], *, names: Sequence[str], seed: int) -> dict[str, Comparison]:
    own = pooled(runs, figure="utility", condition="own")
    assert own is not None
    family = {}
    for name in names:
        other = pooled(runs, figure="utility", condition=name)
        if name != "own" and other is not None:
            family[name] = compare(own, other, seed=seed, num_resamples=NUM_RESAMPLES)
    return corrected(family)


def verdict(against: Mapping[str, Comparison], *, kept: float) -> dict[str, Any]:
    """Whether own beats every rival that may not see the true attributes, at little loss of fidelity."""
    rivals = {name: one for name, one in against.items() if name not in SEES_TRUTH}
    beaten = [name for name, one in rivals.items() if one.low > 0]
    lost_to = [name for name, one in rivals.items() if one.high < 0]
    open_ = [name for name in rivals if name not in beaten and name not in lost_to]
    return {
        "beaten": beaten,
        "lost_to": lost_to,
        "not_told_apart": open_,
        "fidelity_loss": 1 - kept,
        "holds": not lost_to and not open_ and 1 - kept < FIDELITY_LOSS,
    }


def ablation_table(
    runs: Sequence[Evaluated], *, main: Sequence[Evaluated], seed: int
) -> list[dict[str, Any]]:
    """Each ablation minus the main run, user by user; one Holm family over all of them.

    An ablation of several seeds is pooled and held against the main runs of the same seeds, where there are
    such, else against all of them.
    """
    groups: dict[str, list[Evaluated]] = {}
    for one in runs:
        groups.setdefault(one.run.name, []).append(one)
    family: dict[str, Comparison] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, own in groups.items():
        seeds = {one.run.seed for one in own}
        reference = [one for one in main if one.run.seed in seeds] or list(main)
        values = pooled(own, figure="utility", condition="own")
        known = pooled(reference, figure="utility", condition="own")
        if values is None or known is None:
            continue
        if own[0].users != reference[0].users:
            raise DataError(
                f"run {own[0].run.folder} was evaluated on other users or prompts than the main one"
            )
        family[name] = compare(values, known, seed=seed, num_resamples=NUM_RESAMPLES)
        rows[name] = {
            "name": name,
            "group": own[0].run.group,
            "words": own[0].run.words or name,
            "seeds": sorted(seeds),
            "utility": _estimate(values, seed=seed),
            "own_wins": _estimate(pooled(own, figure="own_wins", condition="base"), seed=seed),
            "prompt_fidelity": _estimate(pooled(own, figure="prompt_fidelity", condition="own"), seed=seed),
            "align": _align(own[0]),
        }
    return [{**rows[name], "minus_main": asdict(test)} for name, test in corrected(family).items()]


def _align(one: Evaluated) -> dict[str, Any]:
    found = one.metrics.get("align", {}).get("same_users") or {}
    return {
        name: found[name] for name in ("recall_1", "recall_10", "mmd_before", "mmd_after") if name in found
    }


def claims(plan: Plan, *, known: Sequence[Evaluated], seed: int) -> list[dict[str, Any]]:
    """What the data say about each claim: agree, disagree, or cannot tell."""
    found = []
    for claim in plan.claims:
        sides = [[one for one in known if one.run.name == name] for name in (claim.better, claim.than)]
        row: dict[str, Any] = {"words": claim.words, "better": claim.better, "than": claim.than}
        shared = {one.run.seed for one in sides[0]} & {one.run.seed for one in sides[1]}
        if not shared:
            found.append({**row, "verdict": "not measured", "difference": None})
            continue
        values = [
            pooled([one for one in side if one.run.seed in shared], figure="utility", condition="own")
            for side in sides
        ]
        if sides[0][0].users != sides[1][0].users:
            raise DataError(f"runs {claim.better} and {claim.than} were evaluated on other users or prompts")
        assert values[0] is not None
        assert values[1] is not None
        one = compare(values[0], values[1], seed=seed, num_resamples=NUM_RESAMPLES)
        said = "agrees" if one.low > 0 else "disagrees" if one.high < 0 else "cannot tell"
        found.append({**row, "verdict": said, "difference": asdict(one)})
    return found


def curves(runs: Sequence[Evaluated], *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Curve -> its points in order: own utility, wins over the base model, prompt fidelity."""
    points: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(runs, key=lambda found: found.run.x):
        points.setdefault(one.run.curve or one.run.name, []).append(
            {
                "x": one.run.x,
                "run": one.run.folder,
                "utility": _estimate(one.tables["utility"]["own"], seed=seed),
                "own_wins": _estimate(one.tables["own_wins"]["base"], seed=seed),
                "prompt_fidelity": _estimate(one.tables["prompt_fidelity"]["own"], seed=seed),
            }
        )
    return points
