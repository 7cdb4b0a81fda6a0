"""Every (layer, pooling) cell of both tasks as one batched module on pooled states of a frozen MLLM."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.data.index import read_index
from prefgen.data.parts import WHOLE, Part
from prefgen.errors import DataError
from prefgen.models.lora import load_lora
from prefgen.models.packing import pack_batch
from prefgen.models.pooling import POOLINGS, pooled_states
from prefgen.models.probe_solvers import Classifier, solve_grid
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
from prefgen.stages.probe.unseen import unseen_figures, unseen_report, write_unseen_report

logger = logging.getLogger(__name__)

ARTEFACT = "probe.json"
Reading = Literal["inter", "intra", "inter_target"]
"""A task at a place: the inter-user task may also be read behind a target image."""
GridName = Literal["inter", "intra", "inter_target", "inter_control", "intra_control", "inter_target_control"]


@dataclass(frozen=True, kw_only=True)
class TaskStates:
    """Pooled states of one reading, float16 on the CPU: (samples, cells, D), cells layer by layer.

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
        self.readings: tuple[Reading, ...] = (
            *TASKS,
            *(("inter_target",) if config.data.inter_target else ()),
        )
        for name in self.readings:
            for grid in (name, f"{name}_control"):
                self.grids[grid] = ProbeGrid(
                    num_cells=self.mllm.num_layers * len(POOLINGS),
                    dim=self.mllm.hidden_size,
                    num_classes=classes[_task(name)],
                    generator=generator,
                )
        self.states: dict[Reading, TaskStates] = {}

    def setup(self, stage: str) -> None:
        """Run the frozen MLLM once over all prompts, always in the same order so that a resume is exact."""
        if stage in ("predict", "test") or self.states:
            return
        data = self.trainer.datamodule
        assert isinstance(data, ProbeData)
        self.frozen.to(self.trainer.strategy.root_device)
        for task, prompts in data.prompts.items():
            train = self._pool(prompts.train, features=prompts.train_features, label=f"{task}, training")
            test = self._pool(prompts.test, features=prompts.test_features, label=f"{task}, held out")
            for place in range(train.shape[1]):
                reading: Reading = "inter_target" if place else task
                self.states[reading] = TaskStates(
                    train=train[:, place],
                    labels=prompts.train.labels,
                    control_labels=shuffled(
                        prompts.train.labels, num_cells=train.shape[2], seed=self.config.seed
                    ),
                    test=test[:, place],
                    test_labels=prompts.test.labels,
                    test_users=prompts.test.users,
                )
                for name in (reading, f"{reading}_control"):
                    self._grid(cast(GridName, name)).set_statistics(train[:, place])

    @torch.no_grad()
    def _pool(self, samples: ProbeSamples, *, features: Tensor, label: str) -> Tensor:
        """(samples, places, cells, D) float16 on the CPU."""
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
        return states.reshape(-1, samples.num_places, *states.shape[1:])

    def _grid(self, name: GridName) -> ProbeGrid:
        grid = self.grids[name]
        assert isinstance(grid, ProbeGrid)
        return grid

    # Steps

    def training_step(self, batch: ProbeBatch) -> Tensor:
        """Sum of all cells' losses, the controls' included: no cell's gradient depends on another's."""
        losses = []
        for reading in self.readings:
            numbers: Tensor = getattr(batch, _task(reading))
            share = self.mean_share(len(numbers))
            if not len(numbers):
                # Every rank must touch every parameter, or DDP waits for ever. One process does so too, or
                # AdamW would count its steps otherwise: no gradient is no step, a gradient of 0 is one.
                grids = (self._grid(cast(GridName, name)) for name in (reading, f"{reading}_control"))
                losses += [0 * p.sum() for grid in grids for p in grid.parameters()]
                continue
            states, rows = self.states[reading], numbers.cpu()
            features = states.train[rows].to(self.device)
            for name, labels in ((reading, states.labels), (f"{reading}_control", states.control_labels)):
                per_cell = self._grid(cast(GridName, name)).loss(
                    features, labels=labels[rows].to(self.device)
                )
                losses.append(per_cell.sum() * share)
                self.log(f"train/loss_{name}", per_cell.detach().mean(), batch_size=len(rows))
        return torch.stack(losses).sum()

    def validation_step(self, batch: int) -> None:
        """Accuracy of the best cell of each grid on held-out samples, and of the controls on average."""
        del batch
        for reading in self.readings:
            cells, control = self.accuracies(reading), self.accuracies(reading, control=True)
            best = max(cells, key=lambda cell: cell.accuracy)
            self.log(f"val/accuracy_{reading}", best.accuracy, batch_size=1, sync_dist=True)
            mean = sum(cell.accuracy for cell in control) / len(control)
            self.log(f"val/control_{reading}", mean, batch_size=1, sync_dist=True)

    @torch.no_grad()
    def accuracies(
        self, reading: Reading, *, control: bool = False, classifier: Classifier = "adamw"
    ) -> list[CellAccuracy]:
        """Each cell's accuracy on held-out samples, layer by layer; ridge and logistic are solved here."""
        states = self.states[reading]
        grid = self._grid(cast(GridName, f"{reading}_control" if control else reading))
        if classifier != "adamw":
            grid = solve_grid(
                classifier,
                states.train,
                labels=states.control_labels if control else states.labels,
                num_classes=grid.weight.shape[1],
                l2=self.config.probe.l2,
                device=self.device,
            )
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

    @torch.no_grad()
    def test_step(self, batch: int) -> None:
        """Core and sem of test users, written by the first rank: :mod:`prefgen.stages.probe.unseen`."""
        del batch
        data = self.trainer.datamodule
        assert isinstance(data, ProbeData)
        report = unseen_report(
            self.config,
            mllm=self.mllm,
            choice=self.layer_choice(),
            test=data.load("test", max_users=self.config.data.test_users),
            train=data.load("train", max_users=self.config.data.intra_users),
            lineage=model_lineage(self.config),
        )
        for name, value in unseen_figures(report).items():
            self.log(f"test/{name}", value, batch_size=1, sync_dist=True)
        if self.trainer.is_global_zero:
            self._show("probe/identification", write_unseen_report(report, folder=self.run_dir))

    # Artefact

    def export(self, run_dir: Path) -> Path:
        """Write probe.json and the heat maps, and show the maps in TensorBoard."""
        grids: dict[str, GridReport] = {name: self._grid_report(name) for name in self.readings}
        choice = choose_layers(
            inter=grids["inter"].cells,
            intra=grids["intra"].cells,
            num_layers=self.mllm.num_layers,
            rule=self.config.probe.choice,
            by_hand=self.by_hand,
        )
        report = ProbeReport(
            grids=grids,
            num_layers=self.mllm.num_layers,
            choice=choice,
            rule=self.config.probe.choice,
            rule_words=rule_words(self.config.probe.choice, by_hand=self.by_hand),
            lineage=probe_lineage(self.config, choice=choice),
        )
        path = write_report(report, path=run_dir / ARTEFACT)
        for reading in self.readings:
            picture = heat_map(report, reading=reading, path=run_dir / f"{reading}_user.png")
            self._show(f"probe/{reading}_user", picture)
        logger.info(
            "core: layer %d, %s; sem: layers %s, %s",
            choice.core_layer,
            choice.core_pooling,
            ", ".join(str(layer) for layer in choice.sem_layers),
            choice.sem_pooling,
        )
        return path

    def _grid_report(self, reading: Reading) -> GridReport:
        names = cast(tuple[Classifier, ...], tuple(self.config.probe.classifiers))
        return GridReport(
            classifiers={name: tuple(self.accuracies(reading, classifier=name)) for name in names},
            control=tuple(self.accuracies(reading, control=True, classifier=names[0])),
            num_classes=self._grid(reading).weight.shape[1],
            num_train=len(self.states[reading].labels),
            num_users=len(self.states[reading].test_users.unique()),  # type: ignore[no-untyped-call]
        )

    def _show(self, name: str, picture: NDArray[np.uint8]) -> None:
        """A picture in TensorBoard, if there is one."""
        for board in self.trainer.loggers:
            experiment = getattr(board, "experiment", None)
            if hasattr(experiment, "add_image"):
                experiment.add_image(  # type: ignore[union-attr]
                    name, picture, self.trainer.global_step, dataformats="HWC"
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


def _task(reading: Reading) -> Task:
    return "intra" if reading == "intra" else "inter"
