"""Injects faults and prints what each came to: kills, torn and flipped files, full disks, dead ranks.

    python tools/fault_table.py --out work/faults.md            (an hour or more on two quiet cores)
    python tools/fault_table.py --only files --scale 0.1        (a try)

Groups: fit (real ``prefgen fit`` processes under kill -9), forks (the same from a server that has imported
once),
signals, build, writing (checkpoints and profiles), files (cuts and flipped bits), disk (a small tmpfs, or
/dev/full
where mounting is not allowed), ranks. Exit code 1 if anything is lost beyond the last checkpoint, half
written, or
ends in a traceback.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from prefgen.callbacks import AtomicCheckpointIO
from prefgen.checkpoint import checkpoint_name, list_checkpoints, newest_usable, read_checkpoint
from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.reader import ShardReader
from prefgen.data.shards import read_histories, write_shards
from prefgen.data.verify import verify
from prefgen.errors import PrefgenError, is_disk_full
from prefgen.models.probes import read_choice
from prefgen.models.projector import load_projector
from prefgen.models.readout import load_readout
from prefgen.profile import ProfileCounts, UserProfile
from prefgen.run_folder import read_metrics
from prefgen.stages import STAGES
from prefgen.testing.data import write_raw
from prefgen.testing.faults import (
    Outcome,
    compare_runs,
    judge_file,
    kill_command,
    run_in_process,
    signal_in_process,
    stage_words,
    train,
)
from prefgen.testing.study import save_tiny_workdir
from prefgen.testing.verdict_table import VerdictTable

STEPS, EVERY = 60, 6


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where the faults happen, and how many of each."""

    folder: Path
    workdir: Path
    chance: random.Random
    scale: float

    def count(self, number: int) -> int:
        """So many, or fewer in a try."""
        return max(1, round(number * self.scale))

    def straight(self, stage: str) -> Path:
        """The run that nothing disturbs, made once."""
        run_dir = self.folder / f"straight-{stage}"
        if not list_checkpoints(run_dir / "checkpoints"):
            words = stage_words(stage, workdir=self.workdir, run_dir=run_dir, steps=STEPS, every=EVERY)
            code = run_in_process(train, stage, words)
            assert code == 0, f"{stage}: the undisturbed run ended with {code}"
        return run_dir


def fit_kills(scene: Scene, *, as_command: bool, rounds: int) -> Iterator[Outcome]:
    """Kill -9 several times at random moments, then to the end: equal to the undisturbed run?"""
    kind = "kill -9 of prefgen fit" if as_command else "kill -9 of a forked fit"
    for stage in STAGES:
        run_dir = scene.folder / f"{'command' if as_command else 'fork'}-{stage}"
        words = stage_words(stage, workdir=scene.workdir, run_dir=run_dir, steps=STEPS, every=EVERY)
        folder, left = run_dir / "checkpoints", []
        for _ in range(scene.count(rounds)):
            if as_command:
                command = ["--stage", stage, *words]
                left.append(kill_command(command, folder=folder, chance=scene.chance, every=EVERY, limit=300))
            else:
                after = 0.2 + 4 * scene.chance.random()
                signal_in_process(train, stage, words, after=after, number=signal.SIGKILL)
                found = list_checkpoints(folder)
                left.append(int(found[-1].stem[5:]) if found else 0)
        code = run_in_process(train, stage, words)
        gap = (
            compare_runs(scene.straight(stage), run_dir, stage=stage, steps=STEPS) if code == 0 else f"{code}"
        )
        back = any(b < a for a, b in zip(left, left[1:], strict=False))
        for number, step in enumerate(left, start=1):
            good = not gap and not back
            yield Outcome(
                kind=kind,
                fault=f"{stage}: kill {number} of {len(left)}, newest whole checkpoint is step {step}",
                verdict="equal" if good else "BAD",
                words="weights, moments, schedule and artefact equal the undisturbed run's" if good else gap,
            )


def stop_signals(scene: Scene) -> Iterator[Outcome]:
    """SIGTERM and Ctrl-C: a checkpoint at the next step, then on to an equal end."""
    for stage in STAGES:
        for number in (signal.SIGTERM, signal.SIGINT):
            run_dir = scene.folder / f"{number.name}-{stage}"
            words = stage_words(stage, workdir=scene.workdir, run_dir=run_dir, steps=STEPS, every=STEPS)
            after = 1 + 3 * scene.chance.random()
            code = signal_in_process(train, stage, words, after=after, number=number)
            steps = [path.stem[5:].lstrip("0") for path in list_checkpoints(run_dir / "checkpoints")]
            ended = run_in_process(train, stage, words)
            gap = f"ended with {ended}"
            if ended == 0:
                gap = compare_runs(scene.straight(stage), run_dir, stage=stage, steps=STEPS)
            yield Outcome(
                kind="signals",
                fault=f"{stage}: {number.name} after {after:.1f} s; exit code {code}, checkpoints {steps}",
                verdict="BAD" if gap else "equal",
                words=gap or "goes on to the undisturbed run's end",
            )


def build_forever(history: Path, out: Path) -> None:
    """Build, for a process that is killed meanwhile."""
    write_shards(read_histories(history), root=history.parent, out=out, users_per_shard=2, overwrite=True)


def build_kills(scene: Scene) -> Iterator[Outcome]:
    """Kill -9 while shards are built: no index, whole tars; building again gives the undisturbed bytes."""
    history = write_raw(scene.folder / "raw", num_users=60)
    good = scene.folder / "built"
    start = time.monotonic()
    build_forever(history, good)
    seconds = time.monotonic() - start
    wanted = {path.name: path.read_bytes() for path in good.iterdir()}
    for number in range(scene.count(24)):
        out = scene.folder / f"build-{number}"
        after = 1.5 * seconds * scene.chance.random()
        code = signal_in_process(build_forever, history, out, after=after, number=signal.SIGKILL)
        found = {path.name: path.read_bytes() for path in out.iterdir()} if out.is_dir() else {}
        whole = all(wanted.get(name) == data for name, data in found.items() if name.endswith(".tar"))
        has_index = "index.json" in found
        clean = whole and (not has_index or found["index.json"] == wanted["index.json"])
        build_forever(history, out)
        again = {path.name: path.read_bytes() for path in out.iterdir()}
        yield Outcome(
            kind="kill -9 of a build",
            fault=f"after {after:.2f} s (exit {code}): {len(found)} files, index: {has_index}",
            verdict="equal" if clean and again == wanted else "BAD",
            words="only whole tars under their names; building again gives the same bytes",
        )


def save_forever(folder: Path) -> None:
    """Write checkpoint after checkpoint."""
    writer, step = AtomicCheckpointIO(), 0
    while True:
        step += 1
        value = torch.full((1_000_000,), float(step))
        content = {
            "state_dict": {"weight": value},
            "hyper_parameters": {"stage": "align"},
            "global_step": step,
        }
        writer.save_checkpoint(content, folder / checkpoint_name(step))
        for old in list_checkpoints(folder)[:-2]:
            old.unlink()


def profile_of(number: float) -> UserProfile:
    """A profile whose every number is ``number``."""
    names = ("core_embeds", "sem_embeds", "core_negative", "sem_negative")
    images = ("image_embeds", "image_negative", "image_mean", "image_mean_negative")
    tensors = {name: torch.full((20_000,), number) for name in (*names, *images)}
    return UserProfile(**tensors, counts=ProfileCounts(liked=1, disliked=1, draws=1))


def profiles_forever(path: Path) -> None:
    """Write one profile over and over."""
    number = 0.0
    while True:
        number += 1
        profile_of(number).save(path)


def writing_kills(scene: Scene) -> Iterator[Outcome]:
    """Kill -9 while checkpoints and profiles are written: what has the name is whole."""
    for number in range(scene.count(16)):
        folder = scene.folder / f"saving-{number}"
        folder.mkdir()
        after = 0.1 + scene.chance.random()
        signal_in_process(save_forever, folder, after=after, number=signal.SIGKILL)
        found = list_checkpoints(folder)
        module = torch.nn.ParameterDict({"weight": torch.zeros(1_000_000)})
        path, content = newest_usable(found, module=module, stage="align")
        whole = path == found[-1] and bool((content["state_dict"]["weight"] == content["global_step"]).all())
        yield Outcome(
            kind="kill -9 of a write",
            fault=f"checkpoints, after {after:.2f} s: newest is {path.name}",
            verdict="equal" if whole else "BAD",
            words="the newest name holds one whole checkpoint",
        )
    for number in range(scene.count(16)):
        path = scene.folder / f"me-{number}.safetensors"
        profile_of(0.0).save(path)
        after = 0.05 + 0.5 * scene.chance.random()
        signal_in_process(profiles_forever, path, after=after, number=signal.SIGKILL)
        values = {float(v) for t in UserProfile.load(path).tensors().values() for v in (t.min(), t.max())}
        yield Outcome(
            kind="kill -9 of a write",
            fault=f"profile, after {after:.2f} s: holds number {min(values):.0f}",
            verdict="equal" if len(values) == 1 else "BAD",
            words="the file is one whole profile",
        )


def spoiled_files(scene: Scene) -> Iterator[Outcome]:
    """Cuts and single flipped bits in every kind of file, read as the user's commands read them."""
    work, align = scene.workdir, scene.straight("align")
    checkpoint = list_checkpoints(align / "checkpoints")[-1]
    profile = scene.folder / "spoiled.safetensors"
    profile_of(0.5).save(profile)
    shards, embeddings = work / "shards", work / "embeddings"

    def all_users() -> object:
        reader = ShardReader(shards, split="train")
        if problems := verify(shards, num_workers=1).problems:
            raise PrefgenError(problems[0])
        return [(user.liked, user.disliked) for user in map(reader.read, range(len(reader)))]

    def all_embeddings() -> object:
        reader = EmbeddingReader(embeddings, split="train")
        if problems := verify(embeddings, num_workers=1).problems:
            raise PrefgenError(problems[0])
        return [torch.from_numpy(reader.read(position).sem) for position in range(len(reader))]

    def history() -> object:
        return [str(user) for user in read_histories(work / "raw" / "history.jsonl")]

    reads: list[tuple[Path, Callable[[], object]]] = [
        (checkpoint, lambda: read_checkpoint(checkpoint, stage="align")["state_dict"]),
        (shards / "train-000000.tar", all_users),
        (shards / "index.json", all_users),
        (embeddings / "train-000000.tar", all_embeddings),
        (embeddings / "index.json", all_embeddings),
        (profile, lambda: UserProfile.load(profile).tensors()),
        (
            align / "projector.safetensors",
            lambda: dict(load_projector(align / "projector.safetensors").projector.state_dict()),
        ),
        (
            align / "attribute_readout.safetensors",
            lambda: vars(load_readout(align / "attribute_readout.safetensors")),
        ),
        (work / "probe" / "probe.json", lambda: str(read_choice(work / "probe" / "probe.json"))),
        (align / "metrics.json", lambda: str(read_metrics(align))),
        (work / "raw" / "history.jsonl", history),
    ]
    for path, read in reads:
        if not path.is_file():
            continue
        for how in ("cut", "flip"):
            for _ in range(scene.count(4)):
                yield judge_file(
                    path,
                    how=how,
                    chance=scene.chance,
                    read=read,
                    kind="a cut" if how == "cut" else "a flipped bit",
                )


def full_disks(scene: Scene) -> Iterator[Outcome]:
    """Writing where there is no room: one line, no half file, and on as if nothing had been."""
    small = scene.folder / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, check=False
    )
    history = write_raw(scene.folder / "raw-full", num_users=40, num_liked=8, num_disliked=8)
    try:
        if mounted.returncode == 0:
            yield _full("building shards into a tmpfs of 256 KB", lambda: build_forever(history, small / "s"))
            yield _full("a profile into the same", lambda: _fill(small, profile_of(1.0)))
        else:
            print("mounting is not allowed here: /dev/full stands for a full disk", file=sys.stderr)
        for name, step in (("first", EVERY), ("second", 2 * EVERY), ("last", STEPS)):
            yield _full_checkpoint(scene, name=name, step=step)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(small)], check=False)


def _fill(folder: Path, profile: UserProfile) -> None:
    for number in range(100):
        profile.save(folder / f"{number}.safetensors")


def _full(fault: str, write: Callable[[], None]) -> Outcome:
    try:
        write()
    except Exception as error:  # the table's very question
        said = is_disk_full(error) or "No space left" in str(error)
        words = str(error) if said else f"{type(error).__name__}: {error}"
        return Outcome(kind="full disk", fault=fault, verdict="refused" if said else "BAD", words=words)
    return Outcome(kind="full disk", fault=fault, verdict="BAD", words="nothing was said")


def _full_checkpoint(scene: Scene, *, name: str, step: int) -> Outcome:
    run_dir = scene.folder / f"full-{name}"
    words = stage_words("align", workdir=scene.workdir, run_dir=run_dir, steps=STEPS, every=EVERY)
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{checkpoint_name(step)}.part").symlink_to("/dev/full")
    command = [sys.executable, "-m", "prefgen", "fit", "--stage", "align", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next(
        (text for text in done.stderr.splitlines() if text.startswith("prefgen: error: ")), done.stderr[-200:]
    )
    code = run_in_process(train, "align", words)
    gap = f"ended with {code}"
    if code == 0:
        gap = compare_runs(scene.straight("align"), run_dir, stage="align", steps=STEPS)
    good = done.returncode == 2 and "the disk is full" in line and not gap
    return Outcome(
        kind="full disk",
        fault=f"align: no room for the {name} checkpoint",
        verdict="equal" if good else "BAD",
        words=line if good else f"{line}; {gap}",
    )


def rank_deaths(scene: Scene) -> Iterator[Outcome]:
    """One of two ranks dies, or is told to stop: the other ends too, and the run goes on to its end."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        for victim in (0, 1):
            run_dir = scene.folder / f"rank-{number.name}-{victim}"
            words = stage_words("align", workdir=scene.workdir, run_dir=run_dir, steps=2000, every=EVERY)
            words = [w for w in words if not w.startswith("data.batch_size")]
            words += ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=4"]
            yield _rank_death(run_dir, words, number=number, victim=victim)


def _rank_death(run_dir: Path, words: list[str], *, number: signal.Signals, victim: int) -> Outcome:
    command = [sys.executable, "-m", "prefgen", "fit", "--stage", "align", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list_checkpoints(run_dir / "checkpoints"):
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    started = time.monotonic()
    target = process.pid if victim == 0 else int(children[0])
    subprocess.run(["kill", f"-{int(number)}", str(target)], check=False)
    try:
        _, said = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return Outcome(kind="ranks", fault=f"{number.name} to rank {victim}", verdict="BAD", words="hangs")
    line = next(
        (t for t in reversed(said.splitlines()) if "prefgen" in t or "stopped" in t), "(rank 0 was killed)"
    )
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    seconds = time.monotonic() - started
    usable = read_checkpoint(newest, stage="align")["global_step"] > 0
    return Outcome(
        kind="ranks",
        fault=f"{number.name} to rank {victim} of 2: over in {seconds:.0f} s, {newest.name}",
        verdict="refused" if usable and process.returncode else "BAD",
        words=line,
    )


GROUPS: dict[str, Callable[[Scene], Iterator[Outcome]]] = {
    "fit": lambda scene: fit_kills(scene, as_command=True, rounds=6),
    "forks": lambda scene: fit_kills(scene, as_command=False, rounds=8),
    "signals": stop_signals,
    "build": build_kills,
    "writing": writing_kills,
    "files": spoiled_files,
    "disk": full_disks,
    "ranks": rank_deaths,
}


def main() -> int:
    """Run the groups and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the faults, for a try (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="markdown file for the table")
    args = parser.parse_args()
    table = VerdictTable(kind="group", case="fault", words="what was said or found")
    print(table.head)
    with tempfile.TemporaryDirectory(prefix="prefgen-faults-") as name:
        folder = Path(name)
        workdir = save_tiny_workdir(folder / "work", num_users=48)
        scene = Scene(folder=folder, workdir=workdir, chance=random.Random(args.seed), scale=args.scale)
        for group in args.only:
            for outcome in GROUPS[group](scene):
                line = table.add(
                    kind=outcome.kind,
                    case=outcome.fault.replace(name, ".."),
                    verdict=outcome.verdict,
                    words=outcome.words.replace(name, "..").replace("|", "/")[:220],
                )
                print(line, flush=True)
    print(table.close("faults", out=args.out))
    return 1 if table.counts["BAD"] else 0


if __name__ == "__main__":
    sys.exit(main())
