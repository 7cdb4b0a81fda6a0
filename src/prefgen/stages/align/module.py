"""The projector under MMD^2 over small groups of users, and what its result is worth on unseen users."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from prefgen.config import resolve_path
from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.sampling import rng_for
from prefgen.evaluate import alignment
from prefgen.mmd import mmd2
from prefgen.mmd.bandwidth import mean_bandwidth, median_bandwidth
from prefgen.models.projector import ProjectorShape, SemProjector, save_projector
from prefgen.models.readout import MIN_USERS, fit_readout, save_readout
from prefgen.models.text import TextSpace
from prefgen.stages.align.config import AlignConfig, AlignLossConfig
from prefgen.stages.align.data import AlignBatch, AlignData, EvaluationBatch
from prefgen.stages.base import StageModule, shard_root

logger = logging.getLogger(__name__)

ARTEFACT = "projector.safetensors"
READOUT = "attribute_readout.safetensors"


class AlignModule(StageModule):
    """Stage align: SemProjector trained against the texts of users' liked attributes."""

    stage: ClassVar[str] = "align"
    bandwidth: Tensor

    def __init__(self, config: AlignConfig) -> None:
        super().__init__(config)
        self.config = config
        # The initial weights depend on the seed alone, not on what drew random numbers before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.projector = SemProjector(find_shape(config))
        self._lineage: dict[str, str] = {}
        self.register_buffer("bandwidth", torch.zeros((), dtype=torch.float64))

    def setup(self, stage: str) -> None:
        """Fix scales and bandwidth on training users, unless a checkpoint has brought them."""
        del stage
        data = self._data()
        self._lineage = data.lineage
        if float(self.bandwidth) == 0:
            sem, text = data.statistics()
            self.projector.standardise(sem, text=text)
            self.bandwidth.copy_(fixed_bandwidth(text, rule=self.config.align.bandwidth))

    def _data(self) -> AlignData:
        data = self.trainer.datamodule
        assert isinstance(data, AlignData)
        return data

    def forward(self, sem: Tensor) -> Tensor:
        """(N,Dsem) -> aligned (N,Dtext)."""
        return cast(Tensor, self.projector(sem))

    # Steps

    def training_step(self, batch: AlignBatch) -> Tensor:
        """One batch of whole groups."""
        aligned = self(batch.sem)
        terms = self.losses(aligned, own_text=batch.own_text, mmd_text=batch.mmd_text)
        for name, value in terms.items():
            self.log(f"train/{name}", value.detach(), batch_size=len(aligned))
        return terms["loss"]

    def losses(self, aligned: Tensor, *, own_text: Tensor, mmd_text: Tensor) -> dict[str, Tensor]:
        """Every term with a weight above 0, and ``loss``, their weighted sum.

        Groups are made within a device and never across devices: the mean over groups is then an ordinary
        mean over samples, and the usual averaging of gradients is right.

        Args:
            aligned: (B,Dtext).
            own_text: (B,Dtext) for the point-wise terms.
            mmd_text: (B,Dtext) for the terms that compare sets: MMD and sliced Wasserstein.
        """
        settings = self.config.align
        # A loss in bf16 would see clouds as equal that differ in their third digit.
        aligned = aligned.float()
        terms: dict[str, Tensor] = {}
        with torch.autocast(aligned.device.type, enabled=False):
            if settings.mmd_weight:
                terms["mmd"] = grouped_mmd2(aligned, mmd_text, settings=settings, bandwidth=self.bandwidth)
            ours = (aligned - self.projector.text_mean) / self.projector.text_scale
            texts = (own_text - self.projector.text_mean) / self.projector.text_scale
            if settings.mse_weight:
                terms["mse"] = (ours - texts).pow(2).mean()
            if settings.cosine_weight:
                terms["cosine"] = (1 - functional.cosine_similarity(ours, texts)).mean()
            if settings.infonce_weight:
                terms["infonce"] = grouped_infonce(ours, texts, settings=settings)
            if settings.sliced_wasserstein_weight:
                others = (mmd_text - self.projector.text_mean) / self.projector.text_scale
                directions = draw_directions(
                    settings.sliced_wasserstein_projections,
                    width=others.shape[1],
                    seed=self.config.seed,
                    step=self.global_step,
                ).to(others)
                terms["sliced_wasserstein"] = grouped_sliced_wasserstein(
                    ours, others, directions=directions, group_size=settings.group_size
                )
        weighted = [getattr(settings, f"{name}_weight") * value for name, value in terms.items()]
        terms["loss"] = torch.stack(weighted).sum()
        return terms

    def validation_step(self, batch: EvaluationBatch) -> None:
        """Every measure on unseen users; before training too where trainer.validate_before_fit is set."""
        self._measure(batch, prefix="val")

    def test_step(self, batch: EvaluationBatch) -> None:
        """The same on test users."""
        self._measure(batch, prefix="test")

    def _measure(self, batch: EvaluationBatch, *, prefix: str) -> None:
        with torch.autocast(self.device.type, enabled=False):
            figures = self.measure(batch)
            readable = self.readable(batch)
        for name, areas in readable.items():
            figures[f"readable_{name}"] = float(areas.nanmean())
        for name, value in figures.items():
            self.log(f"{prefix}/{name}", value, batch_size=len(batch.sem), sync_dist=True)
        if self.trainer.is_global_zero:
            self._write_attributes(readable, prefix=prefix)

    @torch.no_grad()
    def measure(self, batch: EvaluationBatch) -> dict[str, float]:
        """Name -> number; see :mod:`prefgen.evaluate.alignment` for each."""
        settings, seed = self.config.align, self.config.seed
        sem, text = batch.sem.float().cpu(), batch.text.float().cpu()
        aligned = self(batch.sem).float().cpu()
        whole = mmd2(
            aligned,
            text,
            kernel=settings.kernel,
            bandwidth=self.bandwidth.cpu(),
            multipliers=settings.multipliers,
            estimator="unbiased",
        )
        figures = {"mmd2": float(whole), "num_users": float(len(text))}
        figures |= _retrieval_figures(aligned, text, same_text=batch.same_text.float().cpu(), seed=seed)
        figures |= _shape_figures(sem, aligned, text, num_neighbours=self.config.evaluation.num_neighbours)
        figures["separability"] = alignment.separability(aligned, text, seed=seed)
        return figures

    @torch.no_grad()
    def readable(self, batch: EvaluationBatch) -> dict[str, Tensor]:
        """(A,) how well each liked attribute is read linearly from sem and from aligned, on unseen users."""
        train, queries = batch.train_sem, batch.sem
        sets = {"sem": (train, queries), "aligned": (self(train), self(queries))}
        return {
            name: alignment.readable_attributes(
                seen.float().cpu(),
                batch.train_labels.cpu(),
                queries=unseen.float().cpu(),
                query_labels=batch.labels.cpu(),
            )
            for name, (seen, unseen) in sets.items()
        }

    def _write_attributes(self, readable: dict[str, Tensor], *, prefix: str) -> None:
        """One line an attribute, beside metrics.json; null where all users of a set agree on it."""
        rows = {
            word: {
                name: None if areas[i].isnan() else round(float(areas[i]), 4)
                for name, areas in readable.items()
            }
            for i, word in enumerate(self._data().attribute_names)
        }
        self.run_dir.mkdir(parents=True, exist_ok=True)
        record = {"measure": "area under the ROC curve of a ridge probe, unseen users", "attributes": rows}
        path = self.run_dir / f"attributes-{prefix}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    # Artefact

    def export(self, run_dir: Path) -> Path:
        """Write ``projector.safetensors``, and beside it the linear readout of attributes from sem."""
        path = run_dir / ARTEFACT
        save_projector(self.projector, path=path, lineage=self._lineage, text=self._text_choice())
        self._export_readout(run_dir / READOUT)
        return path

    def _export_readout(self, path: Path) -> None:
        """Write what ``prefgen profile explain`` reads words with where a profile holds none."""
        data = self._data()
        sem, labels = data.labelled()
        if len(sem) < MIN_USERS:
            path.unlink(missing_ok=True)  # an older fit's would be read as this one's
            logger.warning("no attribute readout: %d training users, it takes %d", len(sem), MIN_USERS)
            return
        readout = fit_readout(
            sem,
            labels=labels,
            attributes=data.attribute_names,
            lineage=data.lineage,
            held_out=data.held_out(),
        )
        save_readout(readout, path=path)
        logger.info("attribute readout: %s (%d attributes, %d users)", path, labels.shape[1], len(sem))

    def _text_choice(self) -> dict[str, str]:
        model = self.config.model
        return {"text_encoder": model.text_encoder, "text_pooling": model.text_pooling}


def find_shape(config: AlignConfig) -> ProjectorShape:
    """The widths of embeddings and text space, read from their files."""
    first = EmbeddingReader(shard_root(config.data.embeddings, loader=config.loader), split="train")[0]
    assert first is not None  # a reader that raises gives no None
    model = config.model
    return ProjectorShape(
        sem_width=first.sem.shape[1],
        text_width=TextSpace.width(
            resolve_path(model.pipeline), part=model.text_encoder, pooling=model.text_pooling
        ),
        hidden_width=model.hidden_width,
    )


def grouped_mmd2(aligned: Tensor, text: Tensor, *, settings: AlignLossConfig, bandwidth: Tensor) -> Tensor:
    """Mean over groups of MMD^2 between a group's aligned rows and its texts (the block estimator).

    Over a full batch MMD hardly changes when users are exchanged; in a group of g it rises as soon as one of
    g users misses the own text, so small groups of the same users teach who is who.

    Args:
        aligned: (B,Dtext), B a multiple of the group size.
        text: (B,Dtext).
        settings: kernel, multipliers, estimator, group size.
        bandwidth: 0-dim, sigma.
    """
    shape = (-1, settings.group_size, text.shape[1])
    values = [
        mmd2(
            ours,
            theirs,
            kernel=settings.kernel,
            bandwidth=bandwidth,
            multipliers=settings.multipliers,
            estimator=settings.estimator,
        )
        for ours, theirs in zip(aligned.reshape(shape), text.reshape(shape), strict=True)
    ]
    return torch.stack(values).mean()


def grouped_infonce(ours: Tensor, texts: Tensor, *, settings: AlignLossConfig) -> Tensor:
    """Cross-entropy of the own text among the group's by cosine, both directions averaged."""
    shape = (-1, settings.group_size, texts.shape[1])
    ours, texts = (functional.normalize(rows, dim=1).reshape(shape) for rows in (ours, texts))
    logits = ours @ texts.transpose(1, 2) / settings.infonce_temperature
    target = torch.arange(settings.group_size, device=ours.device).expand(len(logits), -1)
    there = functional.cross_entropy(logits, target)
    return (there + functional.cross_entropy(logits.transpose(1, 2), target)) / 2


def grouped_sliced_wasserstein(ours: Tensor, texts: Tensor, *, directions: Tensor, group_size: int) -> Tensor:
    """Mean over groups of the squared sliced Wasserstein-2 distance between a group's rows and its texts.

    On a line the cheapest way to carry one set of points onto another of as many goes in order of size, so
    the distance along a direction is that between sorted projections. Moving a set by v gives |v|^2 / Dtext
    on average over directions: the unit of the term mse. (Bonneel et al. 2015; no loss of the paper's.)

    Args:
        ours: (B,Dtext), B a multiple of ``group_size``.
        texts: (B,Dtext).
        directions: (P,Dtext) unit rows.
        group_size: rows of a group.
    """
    shape = (-1, group_size, len(directions))
    ours, texts = ((rows @ directions.T).reshape(shape).sort(dim=1).values for rows in (ours, texts))
    return functional.mse_loss(ours, texts)


def draw_directions(count: int, *, width: int, seed: int, step: int) -> Tensor:
    """(count,width) unit rows, uniform on the sphere: a pure function of (seed, step), equal on all ranks."""
    rng = rng_for(seed=seed, epoch=step, key="", purpose="align directions")
    return functional.normalize(torch.from_numpy(rng.standard_normal((count, width))), dim=1)


def fixed_bandwidth(text: Tensor, *, rule: str) -> Tensor:
    """Sigma as a 0-dim float64: a number, or the root mean square / median distance of texts (N,Dtext)."""
    if rule not in ("mean", "median"):
        return torch.tensor(float(rule), dtype=torch.float64)
    half = len(text) // 2
    measure = mean_bandwidth if rule == "mean" else median_bandwidth
    return measure(text[:half].double(), text[half:].double())


def _area(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else round(float(value), 4)


def _retrieval_figures(aligned: Tensor, text: Tensor, *, same_text: Tensor, seed: int) -> dict[str, float]:
    """Own texts, wrong texts as control, and, as ceiling, the own text found by itself in another order."""
    wrong = alignment.derangement(len(text), seed=seed)
    results = {
        "recall": alignment.retrieval(aligned, text, seed=seed),
        "permuted_recall": alignment.retrieval(aligned, text[wrong], seed=seed),
        "ceiling_recall": alignment.retrieval(same_text, text, seed=seed),
    }
    figures: dict[str, float] = {}
    for name, result in results.items():
        for depth, estimate in ((1, result.recall_1), (10, result.recall_10)):
            figures[f"{name}_{depth}"] = estimate.mean
            figures[f"{name}_{depth}_low"] = estimate.low
            figures[f"{name}_{depth}_high"] = estimate.high
        figures |= {"chance_1": result.chance_1, "chance_10": result.chance_10}
    return figures


def _shape_figures(sem: Tensor, aligned: Tensor, text: Tensor, *, num_neighbours: int) -> dict[str, float]:
    ours, theirs = alignment.spread(aligned), alignment.spread(text)
    return {
        "spread_ratio": ours.distance / max(theirs.distance, 1e-12),
        "effective_rank_aligned": ours.effective_rank,
        "effective_rank_text": theirs.effective_rank,
        "effective_rank_sem": alignment.spread(sem).effective_rank,
        "neighbourhood_overlap": alignment.neighbourhood_overlap(sem, aligned, num_neighbours=num_neighbours),
    }
