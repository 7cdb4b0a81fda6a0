"""The engine of ``prefgen data import``: read, clean, write. Killed anywhere, it goes on and ends the same.

``OUT/.import`` holds the spool while the import runs. ``import.json`` is renamed into place last, so a folder
has it and all the rest, or is not finished.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from prefgen.data.shards import DEFAULT_FRACTIONS
from prefgen.data.sources import card, output
from prefgen.data.sources.base import Batch, Desk, Judgement, Opened, Section, Unusable
from prefgen.data.sources.cleaning import Thresholds, check_possible, run_step
from prefgen.data.sources.pictures import describe, write_picture
from prefgen.data.sources.spool import Spool, open_spool
from prefgen.data.sources.steps import DEFAULT_MIN_JUDGEMENTS, DEFAULT_NEAR_DISTANCE, STEPS
from prefgen.errors import ConfigError, DataError
from prefgen.lineage import hash_file
from prefgen.schema import Source

WORK_FOLDER = ".import"
COMMIT_IMAGES = 256
COMMIT_BYTES = 64 << 20
"""A group of batches ends at either: what is in memory at once, and what a kill can lose."""

_AFTER_READING = frozenset({"clean", "near_distance", "min_judgements", "licence", "source"})

ImportStage = Literal["read", "checksum", "clean", "write"]


class ImportProgress(Protocol):
    """What an import reports to; ``done`` of ``total`` in the unit of its stage, after every commit."""

    def __call__(self, stage: ImportStage, *, done: int, total: int, note: str) -> None:
        """``note`` says what is being done."""


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """How to import.

    Attributes:
        clean: steps to run, see ``STEPS``.
        near_distance: bits in which near-duplicates may differ, 0 to 16.
        min_judgements: fewest judgements of a user who stays.
        fractions: of the splits; what ``prefgen data build`` takes.
        judged_by: instead of the importer's own answer.
        licence: text for the report and the card.
        command: what the user typed, for the report.
        num_workers: threads that decode images; changes nothing else.
    """

    clean: tuple[str, ...] = tuple(STEPS)
    near_distance: int = DEFAULT_NEAR_DISTANCE
    min_judgements: int = DEFAULT_MIN_JUDGEMENTS
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS
    judged_by: Source | None = None
    licence: str = "not stated"
    command: str = ""
    num_workers: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.near_distance <= 16:
            raise ConfigError(f"--near-distance must be 0 to 16, got {self.near_distance}")
        if self.min_judgements < 1:
            raise ConfigError(f"--min-judgements must be 1 or more, got {self.min_judgements}")
        if self.num_workers < 1:
            raise ConfigError(f"--workers must be 1 or more, got {self.num_workers}")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An import that is done: its report, and whether it was done before this call."""

    report: dict[str, Any]
    was_finished: bool


def run_import(
    opened: Opened, *, out: Path, plan: ImportPlan, progress: ImportProgress | None = None
) -> Imported:
    """Import a source into a folder, or go on with an import that was interrupted.

    Args:
        opened: the source.
        out: folder for ``history.jsonl``, ``images/``, ``import.json``, ``card.md`` and ``card.png``.
        plan: how.
        progress: called after every commit.

    Raises:
        DataError: the source is broken, ``out`` holds something else, or nobody is left after cleaning.
    """
    wanted = _request(opened, plan=plan)
    finished = output.finished_report(out, request=wanted)
    if finished is not None:
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
        return Imported(report=finished, was_finished=True)
    work = out / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror}); pass another --out") from None
    with open_spool(work / "spool.sqlite", fractions=plan.fractions) as spool:
        try:
            _begin(spool, request=wanted, command=plan.command, out=out)
            _check_unchanged(opened, spool=spool, out=out)
            _read(opened, spool=spool, out=out, plan=plan, progress=progress)
            _clean(spool, plan=plan, progress=progress)
            report = _finish(opened, spool=spool, out=out, plan=plan, progress=progress)
        except (OSError, sqlite3.OperationalError) as error:  # a full disk, above all
            raise DataError(f"import into {out} stopped: {error}; mend it and repeat the command") from None
    shutil.rmtree(work)
    return Imported(report=report, was_finished=False)


def _request(opened: Opened, *, plan: ImportPlan) -> dict[str, Any]:
    """What makes two imports the same; plain json."""
    options = asdict(plan)
    del options["command"], options["num_workers"], options["judged_by"]
    options["fractions"] = list(plan.fractions)
    options["clean"] = list(plan.clean)
    return {
        "importer": opened.importer,
        "source": plan.judged_by or opened.source,
        **options,
        "sections": [[section.name, section.size] for section in opened.sections],
    }


def _begin(spool: Spool, *, request: dict[str, Any], command: str, out: Path) -> None:
    begun = spool.get("request")
    changed = [key for key in request if begun is not None and begun.get(key) != request[key]]
    if begun is not None and not changed:
        return
    if changed and (spool.get("pruned") or not _AFTER_READING.issuperset(changed)):
        raise DataError(
            f"{out} holds half an import that differs in: {', '.join(changed)}; "
            "repeat its command, delete the folder, or pass another --out"
        )
    spool.uncleaned()  # what was read stays: hours of it should survive a change of mind about cleaning
    spool.put("request", request)
    spool.put("command", command)
    spool.commit()


def _check_unchanged(opened: Opened, *, spool: Spool, out: Path) -> None:
    """What was read before a kill and what is read after it must be one source."""
    stamps = {
        file.relative_to(opened.root).as_posix(): [file.stat().st_size, file.stat().st_mtime_ns]
        for section in opened.sections
        for file in section.files
    }
    earlier = spool.get("stamps")
    if earlier is None:
        spool.put("stamps", stamps)
    elif earlier != stamps:
        changed = next(n for n in {**earlier, **stamps} if earlier.get(n) != stamps.get(n))
        raise DataError(f"{changed} has changed since {out} was begun; delete the folder and import again")


def _read(
    opened: Opened, *, spool: Spool, out: Path, plan: ImportPlan, progress: ImportProgress | None
) -> None:
    """Every section from where the spool stands; then the spool is settled, once."""
    total = sum(section.size for section in opened.sections)
    first, start = spool.get("place") or (0, 0)
    scratch = out / WORK_FOLDER / "scratch"
    with ThreadPoolExecutor(plan.num_workers) as pool:
        for number, section in enumerate(opened.sections):
            if number < first:
                continue
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            before = sum(earlier.size for earlier in opened.sections[:number])
            desk = Desk(scratch=scratch, wanted=spool.wanted)
            for group in _groups(section.read(start if number == first else 0, desk)):
                _spool_group(group, spool=spool, out=out, pool=pool, plan=plan)
                spool.put("place", [number, group[-1].position])
                spool.commit()
                if progress is not None:
                    progress("read", done=before + group[-1].done, total=total, note=section.name)
            _add_files(section, opened=opened, spool=spool, progress=progress)
            spool.put("place", [number + 1, 0])
            spool.commit()
    shutil.rmtree(scratch, ignore_errors=True)
    if spool.get("settled") is None:
        spool.settle()
        spool.put("settled", 1)
        spool.commit()


def _groups(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    images = weight = 0
    for batch in batches:
        group.append(batch)
        payloads = [*(j.image for j in batch.judgements), *(data for _, data in batch.pictures)]
        images += max(1, len(payloads))
        weight += sum(len(data) for data in payloads if isinstance(data, bytes))
        if images >= COMMIT_IMAGES or weight >= COMMIT_BYTES:
            yield group
            group, images, weight = [], 0, 0
    if group:
        yield group


def _spool_group(
    group: list[Batch], *, spool: Spool, out: Path, pool: ThreadPoolExecutor, plan: ImportPlan
) -> None:
    """Describe in threads, write in order. Image files come before the commit that speaks of them."""
    judgements = [judgement for batch in group for judgement in batch.judgements]
    delivered = [item for batch in group for item in batch.pictures]
    datas: list[bytes | Unusable] = [j.image for j in judgements if not isinstance(j.image, str)]
    datas += [data for _, data in delivered]
    found = list(pool.map(describe, datas))
    for data, described in zip(datas, found, strict=True):
        if isinstance(data, bytes) and not described.broken:
            write_picture(data, described=described, out=out)
    facts = iter(found)
    for judgement in judgements:
        if isinstance(judgement.image, str):
            _judge(judgement, picture=spool.promised(judgement.image), spool=spool)
        else:
            _judge(judgement, picture=spool.picture(next(facts)), spool=spool)
    for name, _ in delivered:
        described = next(facts)
        if spool.wanted(name):  # a name delivered twice: the first counts, wherever groups happen to end
            spool.deliver(name, described=described)
    for batch in group:
        for taste in batch.tastes:
            spool.taste(taste)
        for reason, number in batch.skipped.items():
            spool.skip(reason, number=number)


def _judge(judgement: Judgement, *, picture: int, spool: Spool) -> None:
    user = spool.user(judgement.user_id)
    if user is None:
        spool.skip("unusable user_id", number=1)
        return
    spool.judge(
        user=user,
        verdict=judgement.verdict,
        picture=picture,
        prompt=judgement.prompt,
        where=judgement.where,
    )


def _add_files(section: Section, *, opened: Opened, spool: Spool, progress: ImportProgress | None) -> None:
    for number, file in enumerate(section.files):
        if progress is not None:
            progress("checksum", done=number, total=len(section.files), note=file.name)
        row = (file.relative_to(opened.root).as_posix(), file.stat().st_size, hash_file(file))
        spool.sql.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", row)


def _clean(spool: Spool, *, plan: ImportPlan, progress: ImportProgress | None) -> None:
    """Each step in a transaction of its own, with its counts."""
    check_possible(spool, clean=plan.clean)
    thresholds = Thresholds(near_distance=plan.near_distance, min_judgements=plan.min_judgements)
    for number, step in enumerate(plan.clean):
        if spool.get(f"clean {step}") is None:
            spool.put(f"clean {step}", asdict(run_step(spool, step=step, thresholds=thresholds)))
            spool.commit()
        if progress is not None:
            progress("clean", done=number + 1, total=len(plan.clean), note=step)


def _finish(
    opened: Opened, *, spool: Spool, out: Path, plan: ImportPlan, progress: ImportProgress | None
) -> dict[str, Any]:
    """Write everything beside the spool, then rename it into place, the report last."""
    work = out / WORK_FOLDER
    source: Source = plan.judged_by or opened.source
    total = spool.count("SELECT COUNT(*) FROM users")
    counts, samples = output.write_histories(
        spool.histories(source=source), path=work / "history.jsonl", out=out, total=total, progress=progress
    )
    removed = [spool.get(f"clean {step}") for step in plan.clean]
    if not counts.users:
        most = max(removed, key=lambda step: step["judgements"], default=None)
        why = f"; step {most['step']} removed {most['judgements']:,} judgements" if most else ""
        raise DataError(f"nobody is left to import from {opened.root}{why}")
    spool.put("pruned", 1)
    spool.commit()
    output.remove_others(spool, out=out)
    report = output.build_report(opened, spool=spool, counts=counts, removed=removed, source=source)
    card.write_card(report, counts=counts, samples=samples, folder=out, work=work)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (work / output.REPORT_NAME).write_text(text, encoding="utf-8")
    for name in ("history.jsonl", card.TEXT_NAME, card.PICTURE_NAME, output.REPORT_NAME):
        os.replace(work / name, out / name)
    return report
