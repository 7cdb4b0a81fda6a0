"""How many processes train together: the trainer section as a Lightning strategy."""

from __future__ import annotations

import datetime
import logging
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from prefgen.config import TrainerConfig
from prefgen.errors import ConfigError

logger = logging.getLogger(__name__)


def make_strategy(settings: TrainerConfig) -> str | Strategy:
    """The strategy of a trainer section; one process needs none.

    Raises:
        ConfigError: DeepSpeed is asked for and not installed.
    """
    world_size = settings.devices * settings.num_nodes
    timeout = datetime.timedelta(minutes=settings.timeout_minutes)
    backend = "nccl" if settings.accelerator != "cpu" and torch.cuda.is_available() else "gloo"
    if settings.strategy == "deepspeed":
        return _deepspeed(settings)
    if settings.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
            timeout=timeout,
        )
    if world_size == 1 and settings.strategy == "auto":
        return "auto"
    return DDPStrategy(process_group_backend=backend, timeout=timeout)


def _deepspeed(settings: TrainerConfig) -> Strategy:
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "trainer.strategy=deepspeed needs the package deepspeed, which is not installed here; install it "
            "or use trainer.strategy=ddp or fsdp2"
        )
    logger.warning("trainer.strategy=deepspeed is handed to Lightning as it is; prefgen has never tested it")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    if settings.deepspeed_config is not None:
        return DeepSpeedStrategy(config=settings.deepspeed_config)
    return DeepSpeedStrategy(stage=2)


def cluster_plugins() -> list[Any]:
    """Under Slurm: Lightning's environment without its own requeue, which saves between two arbitrary lines.

    prefgen saves at the next optimizer step and requeues then: see :mod:`prefgen.requeue`.
    """
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
