"""One resumable training loop for every part of the foundation.

Batches are a pure function of (seed, step), so a part that was stopped goes on exactly where its last
checkpoint stood. The loop is small on purpose: these are base models made once, not a stage of prefgen.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from prefgen.errors import CheckpointError
from prefgen.foundation.muon import Muon
from prefgen.precision import has_bf16_products
from prefgen.whole_file import whole_file, write_text

log = logging.getLogger(__name__)

StepLoss = Callable[[int, np.random.Generator, torch.Generator], dict[str, Tensor]]
"""(step, numpy generator, torch generator) -> named losses; ``loss`` is minimised."""


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """How long and how fast a part trains.

    Attributes:
        steps: optimizer steps in all.
        batch_size: pictures (or episodes) a step.
        learning_rate: peak; linear warm-up, then cosine to a tenth.
        warmup: steps of warm-up.
        weight_decay: AdamW's.
        ema: decay of the averaged weights; None keeps the raw ones.
        clip: gradient norm limit.
        every: steps between checkpoints and reports.
        seed: of batches, noise and captions.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float | None = None
    clip: float = 1.0
    every: int = 250
    seed: int = 0


def quick() -> torch.autocast:
    """bf16 products where this CPU has instructions for them, float32 elsewhere.

    Without them torch emulates bf16: on a CPU with AVX2 alone a UNet's step took 32 s in place of 1.4.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_products())


def quick_dtype() -> torch.dtype:
    """What products come out in under :func:`quick`."""
    return torch.bfloat16 if has_bf16_products() else torch.float32


class Loop:
    """Train ``module`` by ``loss``; keeps checkpoints and a history of reports in ``folder``.

    ``matrices`` are trained by Muon, all other parameters by AdamW.
    """

    def __init__(
        self, module: nn.Module, *, plan: LoopPlan, folder: Path, matrices: Sequence[nn.Parameter] = ()
    ) -> None:
        self.module = module
        self.plan = plan
        self.folder = folder
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        by_muon = {id(parameter) for parameter in matrices}
        rest = [p for p in self.parameters if id(p) not in by_muon]
        rate, decay = plan.learning_rate, plan.weight_decay
        adamw = torch.optim.AdamW(rest, lr=rate, weight_decay=decay, betas=(0.9, 0.98))
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            self.optimizers.append(Muon(matrices, lr=rate, weight_decay=decay))
        self.average = [p.detach().clone() for p in self.parameters] if plan.ema else None
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    @property
    def checkpoint(self) -> Path:
        """Where this part's state is kept between sessions."""
        return self.folder / "last.ckpt"

    def run(
        self, loss: StepLoss, *, report: Callable[[], dict[str, float]] | None = None, title: str
    ) -> list[dict[str, float]]:
        """Train to ``plan.steps`` from wherever the last checkpoint stands.

        Args:
            loss: computes the named losses of one step.
            report: called beside each checkpoint; its figures go to the log and ``history.json``.
            title: name on the progress bar.

        Returns:
            One entry a report: step, seconds, mean losses since the last report, figures.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        started = time.monotonic() - self.seconds
        sums: dict[str, float] = {}
        with tqdm(total=self.plan.steps, initial=self.step, unit="step", desc=title) as bar:
            while self.step < self.plan.steps:
                losses = self._train_step(loss)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value
                self.step += 1
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
                if self.step % self.plan.every == 0 or self.step == self.plan.steps:
                    self.seconds = time.monotonic() - started
                    since = (self.step - 1) % self.plan.every + 1
                    figures = {name: value / since for name, value in sums.items()}
                    figures |= self._averaged(report) if report else {}
                    entry = {"step": self.step, "seconds": round(self.seconds), **figures}
                    self.history.append({k: float(f"{v:.5g}") for k, v in entry.items()})
                    bar.write(json.dumps({"part": title, **self.history[-1]}))
                    sums = {}
                    self._save()
        return self.history

    def use_average(self) -> None:
        """Put the averaged weights into the module, for good."""
        if self.average is not None:
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.data.copy_(mean)

    def _train_step(self, loss: StepLoss) -> dict[str, float]:
        rng = np.random.default_rng([self.plan.seed, self.step])
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
        rate = self.plan.learning_rate * self._schedule()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        losses = loss(self.step, rng, generator)
        self.module.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None and self.plan.ema is not None:
            # A short-sighted average at first: the random start would otherwise stay in it for long.
            decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.data for p in self.parameters], 1 - decay)
        values = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(values["loss"]):
            raise CheckpointError(
                f"loss is {values['loss']} at step {self.step}; the last good state is {self.checkpoint}: "
                "lower the learning rate and run again"
            )
        return values

    def _schedule(self) -> float:
        plan = self.plan
        if self.step < plan.warmup:
            return (self.step + 1) / plan.warmup
        done = (self.step - plan.warmup) / max(1, plan.steps - plan.warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    def _averaged(self, report: Callable[[], dict[str, float]]) -> dict[str, float]:
        kept = [p.data for p in self.parameters]
        if self.average is not None:
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.data = mean
        self.module.eval()
        with torch.no_grad():
            figures = report()
        self.module.train()
        for parameter, data in zip(self.parameters, kept, strict=True):
            parameter.data = data
        return figures

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "parameters": [p.data for p in self.parameters],
            "buffers": dict(self.module.named_buffers()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
        }
        with whole_file(self.checkpoint) as part:
            torch.save(state, part)
        write_text(self.folder / "history.json", text=json.dumps(self.history, indent=1))

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        shapes = [tuple(p.shape) for p in state["parameters"]]
        if shapes != [tuple(p.shape) for p in self.parameters]:
            raise CheckpointError(
                f"{self.checkpoint} is of another model; remove it or choose another --work"
            )
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        if self.average is not None:
            self.average = state["average"]
        self.module.load_state_dict(state["buffers"], strict=False)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        log.info("going on from step %d of %s", self.step, self.checkpoint)
