"""The resume test that every stage runs: N steps straight equal k steps, stop, resume, N - k steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from prefgen.checkpoint import checkpoint_name
from prefgen.config import StageConfig
from prefgen.errors import StoppedBySignalError
from prefgen.run import fit
from prefgen.run_noise import quiet_lightning
from prefgen.stages.base import StageModule


class BatchRecorder(Callback):
    """Notes a digest of every training batch: tensors, keys and all."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Note one batch."""
        del trainer, pl_module
        digest = hashlib.sha256(str(batch_idx).encode())
        _feed(digest, batch)
        self.digests.append(digest.hexdigest())


def _feed(digest: Any, value: object) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            _feed(digest, getattr(value, item.name))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            _feed(digest, inner)
    else:
        digest.update(repr(value).encode())


@dataclass(frozen=True, kw_only=True)
class ResumeReport:
    """What the two runs left: final checkpoints and digests of the batches seen, in order."""

    straight: dict[str, Any]
    resumed: dict[str, Any]
    straight_batches: tuple[str, ...]
    resumed_batches: tuple[str, ...]


def assert_resume_is_exact(
    config: StageConfig,
    *,
    make_module: Callable[[StageConfig], StageModule],
    make_data: Callable[[StageConfig], LightningDataModule],
    tmp_path: Path,
    num_workers: int = 0,
    steps: int = 6,
    stop: int = 3,
    ema_decay: float | None = 0.9,
) -> ResumeReport:
    """Check that a run stopped and resumed is the run that was never stopped, bit for bit.

    Compared with ``torch.equal``: weights, optimizer state, schedule, EMA, loader position; and by digest the
    batches seen, keys included.

    Args:
        config: the stage's configuration; run_dir, steps, precision, workers and EMA are set here.
        make_module: the stage's module class, or a function like it.
        make_data: the stage's data class, or a function like it. Choose sizes so that ``stop`` falls
            where the test means it: inside an epoch, or at its end.
        tmp_path: an empty folder.
        num_workers: of the training loader.
        steps: optimizer steps in all.
        stop: the step after which the second run is stopped as by SIGTERM.
        ema_decay: of the moving average; None runs without.
    """

    def run(name: str, *, stop_at_step: int | None = None) -> BatchRecorder:
        mine = replace(
            config,
            run_dir=str(tmp_path / name),
            trainer=replace(
                config.trainer, accelerator="cpu", precision="32-true", max_steps=steps, max_epochs=-1
            ),
            loader=replace(config.loader, num_workers=num_workers),
            optim=replace(config.optim, ema_decay=ema_decay),
        )
        recorder = BatchRecorder()
        with quiet_lightning():
            try:
                fit(
                    mine,
                    make_module=lambda: make_module(mine),
                    make_data=lambda: make_data(mine),
                    extra_callbacks=(recorder,),
                    stop_at_step=stop_at_step,
                )
            except StoppedBySignalError:
                assert stop_at_step is not None, "only the second run may be stopped"
        return recorder

    straight = run("straight")
    first = run("resumed", stop_at_step=stop)
    second = run("resumed")
    report = ResumeReport(
        straight=_final(tmp_path / "straight", step=steps),
        resumed=_final(tmp_path / "resumed", step=steps),
        straight_batches=tuple(straight.digests),
        resumed_batches=(*first.digests, *second.digests),
    )
    assert report.resumed_batches == report.straight_batches, "the resumed run saw other batches"
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert_same(report.straight[part], report.resumed[part], where=part)
    # of Lightning's loops only the loader's position: their counters of starts differ by design
    one, other = (
        run["loops"]["fit_loop"]["state_dict"]["combined_loader"] for run in (report.straight, report.resumed)
    )
    assert_same(one, other, where="loader position")
    return report


def _final(run_dir: Path, *, step: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run_dir / "checkpoints" / checkpoint_name(step), weights_only=True)
    return content


def assert_same(one: object, other: object, *, where: str) -> None:
    """Compare nested containers; tensors with ``torch.equal``."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor), f"{where}: {type(other).__name__} instead of a tensor"
        assert torch.equal(one, other), (
            f"{where} differs by {(one.double() - other.double()).abs().max():.3g}"
        )
    elif isinstance(one, Mapping):
        assert isinstance(other, Mapping), where
        assert one.keys() == other.keys(), f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        for key in one:
            assert_same(one[key], other[key], where=f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple), where
        assert len(one) == len(other), f"{where}: {len(one)} and {len(other)} entries"
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, where=f"{where}[{i}]")
    else:
        assert one == other, f"{where}: {one!r} and {other!r}"
