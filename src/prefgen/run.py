"""(stage, config) -> run folder: seed, Trainer, callbacks, resume."""

from __future__ import annotations

from typing import Literal

from prefgen.config import StageConfig

Verb = Literal["fit", "validate", "test", "predict"]


def run_stage(config: StageConfig, *, verb: Verb, stage: str, label: str) -> int:
    """Run one verb of one stage."""
    raise NotImplementedError
