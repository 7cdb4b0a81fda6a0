"""Every (layer, pooling) cell of both tasks as one batched module on pooled states of a frozen MLLM."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.data.index import read_index
from prefgen.data.parts import WHOLE, Part
from prefgen.errors import DataError
from prefgen.models.lora import load_lora
from prefgen.models.packing import pack_batch
from prefgen.models.pooling import POOLINGS, pooled_states
from prefgen.models.probes import (
    CellAccuracy,
    LayerChoice,
    LayersByHand,
    ProbeGrid,
    cell_accuracies,
    choose_layers,
    read_choice,
    rule_words,
)
from prefgen.stages.base import StageModule, shard_root
from prefgen.stages.features import load_mllm, model_hash
from prefgen.stages.probe.config import ProbeConfig
from prefgen.stages.probe.data import TASKS, ProbeBatch, ProbeData, Task
from prefgen.stages.probe.draws import ProbeSamples, shuffled
from prefgen.stages.probe.embed import model_lineage, probe_lineage, write_embeddings
from prefgen.stages.probe.report import GridReport, ProbeReport, heat_map, write_report

logger = logging.getLogger(__name__)

ARTEFACT = "probe.json"
GridName = Literal["inter", "intra", "inter_control", "intra_control"]


@dataclass(frozen=True, kw_only=True)
class TaskStates:
    """Pooled states of one task, float16 on the CPU: (samples, cells, D), cells layer by layer.

    Attributes:
        control_labels: (samples, cells) the training labels, in a random order for each cell.
    """

    train: Tensor
    labels: Tensor
    control_labels: Tensor
    test: Tensor
    test_labels: Tensor
    test_users: Tensor


class ProbeModule(StageModule):
    """Stage probe."""

    stage: ClassVar[str] = "probe"

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.config = config
        model = config.model
        self.mllm = load_mllm(model)
        probe = config.probe
        self.by_hand = LayersByHand(
            sem_layers=probe.sem_layers,
            sem_pooling=probe.sem_pooling,
            core_layer=probe.core_layer,
            core_pooling=probe.core_pooling,
        )
        self.by_hand.check(num_layers=self.mllm.num_layers)
        if model.lora:
            load_lora(self.mllm, path=resolve_path(model.lora), mllm_hash=model_hash(model.mllm))
        self.frozen = self.mllm.model.requires_grad_(False)
        self.grids = nn.ModuleDict()
        validation = read_index(
            shard_root(config.data.shards, loader=config.loader), kind="histories"
        ).counts("validation")
        classes = {"inter": min(config.data.inter_users, validation.users), "intra": 2}
        generator = torch.Generator().manual_seed(config.seed)
        for name in TASKS:
            for grid in (name, f"{name}_control"):
                self.grids[grid] = ProbeGrid(
                    num_cells=self.mllm.num_layers * len(POOLINGS),
                    dim=self.mllm.hidden_size,
                    num_classes=classes[name],
                    generator=generator,
                )
        self.states: dict[Task, TaskStates] = {}

    def setup(self, stage: str) -> None:
        """Run the frozen MLLM once over all prompts, always in the same order so that a resume is exact."""
        if stage == "predict" or self.states:
            return
        data = self.trainer.datamodule
        assert isinstance(data, ProbeData)
        self.frozen.to(self.trainer.strategy.root_device)
        for task, prompts in data.prompts.items():
            train = self._pool(prompts.train, features=prompts.train_features, label=f"{task}, training")
            test = self._pool(prompts.test, features=prompts.test_features, label=f"{task}, held out")
            self.states[task] = TaskStates(
                train=train,
                labels=prompts.train.labels,
                control_labels=shuffled(
                    prompts.train.labels, num_cells=train.shape[1], seed=self.config.seed
                ),
                test=test,
                test_labels=prompts.test.labels,
                test_users=prompts.test.users,
            )
            for name in (task, f"{task}_control"):
                self._grid(cast(GridName, name)).set_statistics(train)

    @torch.no_grad()
    def _pool(self, samples: ProbeSamples, *, features: Tensor, label: str) -> Tensor:
        parts, step = [], self.config.data.rows_per_pass
        starts = range(0, len(samples.items), step)
        with self.trainer.precision_plugin.forward_context():
            for start in tqdm(starts, desc=f"reading layers ({label})", disable=len(starts) < 20):
                items = samples.items[start : start + step]
                batch = pack_batch(self.mllm.encoder, items=items, max_length=self.mllm.max_length)
                pooled = pooled_states(self.mllm, batch=batch.to(self.mllm.device), image_features=features)
                parts.append(pooled.flatten(1, 2).half().cpu())
        states = torch.cat(parts)
        if not bool(torch.isfinite(states).all()):
            raise DataError(
                f"hidden states ({label}) hold NaN or overflow float16; try model.frozen_dtype=float32"
            )
        return states

    def _grid(self, name: GridName) -> ProbeGrid:
        grid = self.grids[name]
        assert isinstance(grid, ProbeGrid)
        return grid

    # Steps

    def training_step(self, batch: ProbeBatch) -> Tensor:
        """Sum of all cells' losses, the controls' included: no cell's gradient depends on another's."""
        losses = []
        for task, numbers in (("inter", batch.inter), ("intra", batch.intra)):
            share = self.mean_share(len(numbers))
            if not len(numbers):
                if self.trainer.world_size > 1:  # every rank must touch every parameter
                    grids = (self._grid(cast(GridName, name)) for name in (task, f"{task}_control"))
                    losses += [0 * p.sum() for grid in grids for p in grid.parameters()]
                continue
            states, rows = self.states[cast(Task, task)], numbers.cpu()
            features = states.train[rows].to(self.device)
            for name, labels in ((task, states.labels), (f"{task}_control", states.control_labels)):
                per_cell = self._grid(cast(GridName, name)).loss(
                    features, labels=labels[rows].to(self.device)
                )
                losses.append(per_cell.sum() * share)
                self.log(f"train/loss_{name}", per_cell.detach().mean(), batch_size=len(rows))
        return torch.stack(losses).sum()

    def validation_step(self, batch: int) -> None:
        """Accuracy of the best cell of each grid on held-out samples, and of the controls on average."""
        del batch
        for task in TASKS:
            cells, control = self.accuracies(task), self.accuracies(task, control=True)
            best = max(cells, key=lambda cell: cell.accuracy)
            self.log(f"val/accuracy_{task}", best.accuracy, batch_size=1, sync_dist=True)
            mean = sum(cell.accuracy for cell in control) / len(control)
            self.log(f"val/control_{task}", mean, batch_size=1, sync_dist=True)

    @torch.no_grad()
    def accuracies(self, task: Task, *, control: bool = False) -> list[CellAccuracy]:
        """Each cell's accuracy on the held-out samples, layer by layer."""
        states = self.states[task]
        grid = self._grid(cast(GridName, f"{task}_control" if control else task))
        right = []
        for start in range(0, len(states.test), 512):
            guesses = grid(states.test[start : start + 512].to(self.device)).argmax(-1).cpu()
            right.append(guesses == states.test_labels[start : start + 512, None])
        return cell_accuracies(
            torch.cat(right).double().numpy(),
            groups=states.test_users.numpy(),
            num_layers=self.mllm.num_layers,
            seed=self.config.seed,
            num_resamples=self.config.probe.num_resamples,
        )

    # Artefact

    def export(self, run_dir: Path) -> Path:
        """Write probe.json and the heat maps, and show the maps in TensorBoard."""
        grids = {task: self._grid_report(task) for task in TASKS}
        choice = choose_layers(
            inter=grids["inter"].cells,
            intra=grids["intra"].cells,
            num_layers=self.mllm.num_layers,
            rule=self.config.probe.choice,
            by_hand=self.by_hand,
        )
        report = ProbeReport(
            inter=grids["inter"],
            intra=grids["intra"],
            num_layers=self.mllm.num_layers,
            choice=choice,
            rule=self.config.probe.choice,
            rule_words=rule_words(self.config.probe.choice, by_hand=self.by_hand),
            lineage=probe_lineage(self.config, choice=choice),
        )
        path = write_report(report, path=run_dir / ARTEFACT)
        for task in TASKS:
            picture = heat_map(report, task=task, path=run_dir / f"{task}_user.png")
            for board in self.trainer.loggers:
                experiment = getattr(board, "experiment", None)
                if hasattr(experiment, "add_image"):
                    experiment.add_image(  # type: ignore[union-attr]
                        f"probe/{task}_user", picture, self.trainer.global_step, dataformats="HWC"
                    )
        logger.info(
            "core: layer %d, %s; sem: layers %s, %s",
            choice.core_layer,
            choice.core_pooling,
            ", ".join(str(layer) for layer in choice.sem_layers),
            choice.sem_pooling,
        )
        return path

    def _grid_report(self, task: Task) -> GridReport:
        return GridReport(
            cells=tuple(self.accuracies(task)),
            control=tuple(self.accuracies(task, control=True)),
            num_classes=self._grid(task).weight.shape[1],
            num_train=len(self.states[task].labels),
            num_users=len(self.states[task].test_users.unique()),  # type: ignore[no-untyped-call]
        )

    # Predict

    def layer_choice(self) -> LayerChoice:
        """The choice that fit has written into the run folder.

        Raises:
            CheckpointError: none there, or it was made with another MLLM or LoRA than configured.
        """
        return read_choice(self.run_dir / ARTEFACT, lineage=model_lineage(self.config))

    def predict(self, data: LightningDataModule, *, part: Part = WHOLE) -> Path:
        """Write embedding shards of all splits, or a part of them."""
        del data
        return write_embeddings(
            self.config, mllm=self.mllm, choice=self.layer_choice(), device=self.device, part=part
        )
