"""(stage, config) -> run folder: seed, Trainer, TensorBoard, callbacks, resume; fit, validate, test, predict.

A run folder holds ``config.yaml`` (resolved), ``checkpoints/``, ``tensorboard/``, ``metrics.json`` and the
stage's artefact. ``fit`` on a folder that has checkpoints goes on from the newest; only the keys of
``CHANGEABLE`` may then differ.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from prefgen.callbacks import BEST_NAME, AtomicCheckpointIO, RunCheckpoint, StepSeed, TrainedEMA
from prefgen.checkpoint import check_trained, list_checkpoints, newest_usable, put_trained, read_checkpoint
from prefgen.config import StageConfig, to_yaml
from prefgen.errors import CheckpointError, ConfigError, PrefgenError, StoppedBySignalError
from prefgen.guards import StepGuard, as_user_error
from prefgen.precision import settle_precision
from prefgen.predicting import predict
from prefgen.progress import ClockBar, ProgressLines
from prefgen.requeue import REQUEUE_SIGNAL, requeue, stopping_before_training, under_slurm
from prefgen.run_folder import (
    check_same_inputs,
    check_same_run,
    read_metrics,
    write_inputs,
    write_metrics,
)
from prefgen.run_noise import quiet_lightning, user_errors
from prefgen.stages import STAGES
from prefgen.stages.base import StageModule
from prefgen.stages.sharding import make_trained_whole
from prefgen.strategies import cluster_plugins, make_strategy
from prefgen.whole_file import write_text

logger = logging.getLogger(__name__)

Verb = Literal["fit", "validate", "test", "predict"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left behind.

    Attributes:
        exit_code: 0, or 128 + the number of the signal that stopped the run.
        places: what lies where, e.g. ``{"artefact": .., "checkpoint": .., "log": .., "metrics": ..}``.
        metrics: the figures measured last.
    """

    exit_code: int = 0
    places: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def run_stage(config: StageConfig, *, verb: Verb, stage: str) -> RunResult:
    """Run one verb of one stage.

    Raises:
        PrefgenError: anything the user can mend.
    """
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    check_device(config)
    config = settle_precision(config)
    module_type, data_type = load_class(STAGES[stage].module), load_class(STAGES[stage].data)
    with quiet_lightning(), user_errors():
        try:
            if verb != "fit":
                return use(config, verb=verb, module=module_type(config), data=data_type(config))
            with stopping_before_training(Path(config.run_dir)):
                return fit(
                    config, make_module=lambda: module_type(config), make_data=lambda: data_type(config)
                )
        except StoppedBySignalError as error:
            logger.warning("%s; run the same command again to go on", error)
            if error.signal_number == REQUEUE_SIGNAL and under_slurm():
                requeue()
            return RunResult(exit_code=128 + error.signal_number)
        except PrefgenError:
            raise
        except Exception as error:
            if (plain := as_user_error(error, config=config)) is None:
                raise
            raise plain from error


def load_class(path: str) -> Callable[[StageConfig], Any]:
    """``package.module:Name`` as an object."""
    module, _, name = path.partition(":")
    return cast(Callable[[StageConfig], Any], getattr(import_module(module), name))


def check_device(config: StageConfig) -> None:
    """Refuse what this machine cannot do and Lightning finds out late or never.

    Raises:
        ConfigError: 16-mixed or accelerator=gpu without a GPU.
    """
    if torch.cuda.is_available():
        return
    if config.trainer.accelerator == "gpu":
        raise ConfigError("trainer.accelerator=gpu, but torch sees no GPU here; use trainer.accelerator=cpu")
    if config.trainer.precision == "16-mixed":
        raise ConfigError(
            "trainer.precision=16-mixed needs a GPU, and torch sees none; use trainer.precision=bf16-mixed"
        )


def fit(
    config: StageConfig,
    *,
    make_module: Callable[[], StageModule],
    make_data: Callable[[], LightningDataModule],
    extra_callbacks: tuple[Callback, ...] = (),
    stop_at_step: int | None = None,
) -> RunResult:
    """Train from the start or from the run folder's newest checkpoint, then export and write metrics.json.

    Args:
        config: the stage's configuration.
        make_module: builds the module; called after seeding.
        make_data: builds the data module.
        extra_callbacks: more callbacks, before ours.
        stop_at_step: stop as SIGTERM would after this optimizer step (tests).

    Raises:
        StoppedBySignalError: a signal came; a checkpoint was written.
        ConfigError: the folder belongs to a run with another configuration.
        CheckpointError: none of its checkpoints can be used, or its inputs have changed since. Where only the
            newest cannot, it is set aside with words and the one before it is used.
    """
    run_dir = Path(config.run_dir)
    found = list_checkpoints(run_dir / "checkpoints")
    resume = found[-1] if found else None
    if resume is not None:
        check_same_run(run_dir, config=config)
        check_same_inputs(run_dir, config=config)
        if (finished := finished_run(config, newest=resume)) is not None:
            logger.info("already finished; delete %s or pass another run_dir to train anew", run_dir)
            return finished
    seed_everything(config.seed, verbose=False)
    module, data = make_module(), make_data()
    if found:
        resume, content = newest_usable(
            found, module=module, stage=module.stage, set_aside=rank_zero_only.rank == 0
        )
        logger.info("going on from %s (step %d)", resume, int(content["global_step"]))
    trainer = build_trainer(config, extra_callbacks=extra_callbacks, stop_at_step=stop_at_step)
    if trainer.is_global_zero:
        write_text(run_dir / "config.yaml", text=to_yaml(config), shared=True)
        if resume is None:
            write_inputs(run_dir, config=config)
    if resume is None and config.trainer.validate_before_fit:
        trainer.validate(module, datamodule=data, verbose=False)
        if trainer.is_global_zero:
            write_metrics(run_dir, stage=module.stage, seed=config.seed, before=_metrics(trainer))
        seed_everything(config.seed, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return _finish(config, trainer=trainer, module=module)


def finished_run(config: StageConfig, *, newest: Path) -> RunResult | None:
    """What a run folder holds if nothing is left to train or to export in it, else None."""
    run_dir = Path(config.run_dir)
    content = read_metrics(run_dir)
    finished = content.get("finished")
    if finished is None or finished["checkpoint"] != newest.name:
        return None
    settings, steps, epochs = config.trainer, content["steps"], content["epochs"]
    done = (
        content["stopped_early"] or (0 < settings.max_steps <= steps) or (0 < settings.max_epochs <= epochs)
    )
    places = {name: run_dir / place for name, place in finished["places"].items()}
    if not done or not all(place.exists() for place in places.values()):
        return None
    return RunResult(places=places, metrics=content.get("fit", {}))


def _finish(config: StageConfig, *, trainer: Trainer, module: StageModule) -> RunResult:
    """Write metrics.json and, from the best or else the last weights, the artefact."""
    run_dir = Path(config.run_dir)
    metrics = _metrics(trainer)
    make_trained_whole(module)
    checkpoint = load_weights(config, module=module)
    if not trainer.is_global_zero:
        return RunResult(metrics=metrics)
    write_metrics(
        run_dir,
        stage=module.stage,
        seed=config.seed,
        steps=trainer.global_step,
        epochs=trainer.current_epoch,
        stopped_early=trainer.should_stop,  # only early stopping sets it
        # a run that was killed between its last step and its export measures nothing when it goes on
        **({"fit": metrics} if metrics else {}),
    )
    artefact = module.export(run_dir)
    places = {"checkpoint": checkpoint, "log": run_dir / "tensorboard", "metrics": run_dir / "metrics.json"}
    if artefact is not None:
        places = {"artefact": artefact, **places}
    newest = list_checkpoints(run_dir / "checkpoints")[-1].name
    relative = {name: str(place.relative_to(run_dir)) for name, place in places.items()}
    write_metrics(run_dir, finished={"checkpoint": newest, "places": relative})
    return RunResult(places=places, metrics=metrics)


def load_weights(config: StageConfig, *, module: StageModule) -> Path:
    """Put the weights of the run folder's best checkpoint, or else its newest, into the module.

    Where the run keeps an EMA, the averages are what is loaded.

    Returns:
        The checkpoint used.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    folder = Path(config.run_dir) / "checkpoints"
    found = list_checkpoints(folder)
    best = folder / BEST_NAME
    if config.checkpoint.monitor is not None and best.is_file():
        path, checkpoint = best, read_checkpoint(best, stage=module.stage)
        check_trained(checkpoint["state_dict"], module=module, where=str(path))
    elif found:
        path, checkpoint = newest_usable(found, module=module, stage=module.stage)
    else:
        raise CheckpointError(
            f"no checkpoint in {folder}; "
            f"run 'prefgen fit --stage {module.stage} run_dir={config.run_dir}' first"
        )
    put_trained(checkpoint["state_dict"], module=module)
    ema_state = checkpoint["callbacks"].get(TrainedEMA.__qualname__)
    if ema_state is not None:
        ema = TrainedEMA(decay=0.0)
        ema.load_state_dict(ema_state)
        ema.put_into(module)
    return path


def use(config: StageConfig, *, verb: Verb, module: StageModule, data: LightningDataModule) -> RunResult:
    """Validate, test or predict with the weights of the run folder.

    Raises:
        CheckpointError: the run folder has no usable checkpoint.
    """
    run_dir = Path(config.run_dir)
    seed_everything(config.seed, verbose=False)
    if verb == "predict" and config.trainer.strategy == "fsdp2":  # nothing trains: ranks share the users only
        config = replace(config, trainer=replace(config.trainer, strategy="ddp"))
    trainer = build_trainer(config)
    checkpoint = load_weights(config, module=module)
    if verb == "predict":
        place = predict(trainer, module=module, data=data)
        return RunResult(places={"predictions": place, "checkpoint": checkpoint})
    measure = trainer.validate if verb == "validate" else trainer.test
    measure(module, datamodule=data, verbose=False)
    metrics = _metrics(trainer)
    if trainer.is_global_zero:
        write_metrics(run_dir, stage=module.stage, seed=config.seed, **{verb: metrics})
    return RunResult(places={"checkpoint": checkpoint, "metrics": run_dir / "metrics.json"}, metrics=metrics)


def build_trainer(
    config: StageConfig,
    *,
    extra_callbacks: tuple[Callback, ...] = (),
    stop_at_step: int | None = None,
) -> Trainer:
    """The Lightning Trainer of a run, with our callbacks in the order they depend on each other."""
    settings = config.trainer
    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=make_strategy(settings),
        precision=settings.precision,
        max_steps=settings.max_steps,
        max_epochs=settings.max_epochs,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        val_check_interval=settings.val_check_interval,
        # an interval in batches may span epochs: small data sets have few batches each
        check_val_every_n_epoch=1 if settings.val_check_interval is None else None,
        limit_val_batches=settings.limit_val_batches,
        log_every_n_steps=settings.log_every_n_steps,
        logger=TensorBoardLogger(config.run_dir, name="tensorboard", version="", default_hp_metric=False),
        callbacks=[*extra_callbacks, *_callbacks(config, stop_at_step=stop_at_step)],
        plugins=[AtomicCheckpointIO(), *cluster_plugins()],
        default_root_dir=config.run_dir,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the loader splits ranks itself and stays resumable
    )


def _callbacks(config: StageConfig, *, stop_at_step: int | None) -> list[Callback]:
    checkpoint = config.checkpoint
    callbacks: list[Callback] = [StepSeed(seed=config.seed)]
    callbacks.append(StepGuard(max_bad_steps=config.guard.max_bad_steps))
    callbacks.append(ClockBar() if sys.stderr.isatty() else ProgressLines())
    if config.optim.ema_decay is not None:
        callbacks.append(TrainedEMA(decay=config.optim.ema_decay))
    if config.optim.early_stopping_patience is not None:
        callbacks.append(
            EarlyStopping(
                monitor=str(checkpoint.monitor),
                mode=checkpoint.mode,
                patience=config.optim.early_stopping_patience,
                strict=True,
            )
        )
    callbacks.append(
        RunCheckpoint(
            folder=Path(config.run_dir) / "checkpoints",
            every_n_steps=checkpoint.every_n_steps,
            keep_last=checkpoint.keep_last,
            monitor=checkpoint.monitor,
            mode=checkpoint.mode,
            stop_at_step=stop_at_step,
        )
    )
    return callbacks


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
