"""How a run shows where it is: a bar with a clock in a terminal, plain lines in a log file or a pipe."""

from __future__ import annotations

import datetime
import logging
import math
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

logger = logging.getLogger(__name__)


class RunClock:
    """Time since the start of this process's training, and when the whole run will end at this rate."""

    def __init__(self, *, step: int) -> None:
        self._step, self._start = step, time.monotonic()

    def rate(self, *, step: int) -> float:
        """Optimizer steps a second; 0 before the first."""
        return (step - self._step) / max(1e-9, time.monotonic() - self._start)

    def running(self) -> str:
        """Time since the start, such as ``0:12:31``."""
        return str(datetime.timedelta(seconds=int(time.monotonic() - self._start)))

    def end(self, *, step: int, total: float) -> str:
        """``0:03:10 left, ends 15:42``; with the date where that is not today."""
        rate = self.rate(step=step)
        if not math.isfinite(total):
            return "no end set"
        if rate <= 0:
            return "end unknown"
        left = datetime.timedelta(seconds=int((total - step) / rate))
        now = datetime.datetime.now()
        end = now + left
        return (
            f"{left} left, ends {end:%H:%M}"
            if end.date() == now.date()
            else f"{left} left, ends {end:%d %b %H:%M}"
        )


class ClockBar(TQDMProgressBar):
    """Lightning's bar, whose times are those of an epoch, with the clock of the whole run behind it."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5)
        self._clock: RunClock | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock = RunClock(step=trainer.global_step)
        super().on_train_start(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float]:
        """What stands behind the bar."""
        shown: dict[str, int | str | float] = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        if self._clock is not None:
            end = self._clock.end(step=trainer.global_step, total=trainer.estimated_stepping_batches)
            shown["run"] = f"{self._clock.running()}, {end}"
        return shown


class ProgressLines(Callback):
    """Progress as plain log lines, for a log file or a pipe, where a moving bar would be unreadable."""

    def __init__(self, *, every_seconds: float = 10.0) -> None:
        self._every = every_seconds
        self._last = 0.0
        self._start_step = 0
        self._clock = RunClock(step=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self._start_step, self._clock = trainer.global_step, RunClock(step=trainer.global_step)
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Write a line now and then: steps, rate, time left, loss."""
        del pl_module, batch, batch_idx
        now, step = time.monotonic(), trainer.global_step
        if now - self._last < self._every or step == self._start_step or not trainer.is_global_zero:
            return
        self._last = now
        total = trainer.estimated_stepping_batches
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        logger.info(
            "step %d/%s, %.2f steps/s, %s, running %s%s",
            step,
            total,
            self._clock.rate(step=step),
            self._clock.end(step=step, total=total),
            self._clock.running(),
            "" if loss is None else f", loss {float(loss):.4g}",
        )
