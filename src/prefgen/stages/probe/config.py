"""What can be set for stage probe. No torch here: the command line checks a config before anything heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefgen.config import DataConfig, RequiredInput, StageConfig, TrainerConfig, at_least, given, require
from prefgen.config_mllm import MLLMConfig
from prefgen.inputs import history_shards, lora_folder

Pooling = Literal["last", "image_mean", "mean", "max"]
"""As ``prefgen.models.pooling.Pooling``, which stands behind torch."""

CLASSIFIERS = ("adamw", "ridge", "logistic")
"""As prefgen.models.probe_solvers names them, which may not be imported here."""


@dataclass
class ProbeDataConfig(DataConfig):
    """Which users are probed, with how many draws."""

    batch_size: int = 256
    """Pooled samples per step."""
    shards: str = "${workdir}/shards"
    """Folder of history shards, written by 'prefgen data build'."""
    feature_cache: str = "${workdir}/features"
    """Folder where stages vqa and probe share image features; empty keeps them in memory only."""
    rows_per_pass: int = 16
    """Packed rows in one pass of the MLLM."""
    inter_users: int = 128
    """Validation users to be told apart; fewer if there are fewer."""
    inter_train_draws: int = 12
    """Draws a user from one half of its images, to train on."""
    inter_test_draws: int = 6
    """Draws a user from the other half, to test on; the two share no image."""
    inter_references: int = 5
    """References of either side in such a draw."""
    inter_target: bool = False
    """Read the same draws also behind a target image, as a grid of its own beside: does a target help to tell
    users apart? The choice of layers does not look at it."""
    intra_users: int = 384
    """Training users whose like-or-dislike answers train the intra-user probe; validation users test it."""
    intra_queries: int = 6
    """Target images a user."""
    intra_references: int = 8
    """References of either side before the target."""
    sides: Literal["both", "liked"] = "both"
    """Which references stand in a history, in the probes and in what predict writes: liked leaves the
    disliked ones out, except for a user without a liked one, for whom nothing else speaks."""
    test_users: int = 128
    """Test users whom 'prefgen test' measures core and sem on; 0 takes all."""
    test_histories: int = 4
    """Histories that share no image, cut from each of them, with up to data.inter_references a side."""
    test_targets: int = 1
    """Target images of either side behind each such history."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        at_least("data.rows_per_pass", self.rows_per_pass, minimum=1)
        at_least("data.inter_users", self.inter_users, minimum=2)
        for name in ("inter_train_draws", "inter_test_draws", "inter_references"):
            at_least(f"data.{name}", getattr(self, name), minimum=1)
        at_least("data.test_users", self.test_users, minimum=0)
        at_least("data.test_histories", self.test_histories, minimum=2)
        for name in ("intra_users", "intra_queries", "intra_references", "test_targets"):
            at_least(f"data.{name}", getattr(self, name), minimum=1)


@dataclass
class ProbeModelConfig(MLLMConfig):
    """The frozen models that make the numbers."""

    lora: str = "${workdir}/vqa/lora"
    """Folder of stage vqa's LoRA; empty probes the MLLM as it was before."""
    image_encoder: str = "asset:mini/pipeline/image_encoder"
    """Folder of the diffusion pipeline's image encoder, for the image embeddings that predict writes."""


@dataclass
class ProbeSectionConfig:
    """How core and sem are chosen from the grids."""

    choice: Literal["rule", "paper", "by_hand"] = "rule"
    """rule: sem from the four layers and the pooling that tell like from dislike best;
    paper: last token of the top four layers. core is the best inter-user cell of the upper half in both.
    by_hand: what the next four keys give, and the rule for the rest."""
    sem_layers: tuple[int, ...] = ()
    """by_hand: layers of sem, 1 (lowest) to the MLLM's number of layers; empty leaves them to the rule."""
    sem_pooling: Pooling | None = None
    """by_hand: pooling of sem; null leaves it to the rule."""
    core_layer: int | None = None
    """by_hand: layer of core; null leaves it to the rule."""
    core_pooling: Pooling | None = None
    """by_hand: pooling of core; null leaves it to the rule."""
    classifiers: tuple[str, ...] = ("adamw",)
    """Linear classifiers on the same pooled states, of adamw, ridge and logistic; layers are chosen by the
    first. adamw trains for trainer.max_steps steps, in any case; the others are solved to the end."""
    l2: float = 0.01
    """Strength of ridge and logistic beside the mean loss on standardised states."""
    num_resamples: int = 1000
    """Bootstrap resamplings of users behind each interval."""

    def __post_init__(self) -> None:
        """Check ranges."""
        names = tuple(self.classifiers)
        require(
            0 < len(names) == len(set(names)) and set(names) <= set(CLASSIFIERS),
            f"probe.classifiers=[{', '.join(names)}] must name one or more of {', '.join(CLASSIFIERS)}, "
            "each once",
        )
        if given(self.l2):
            require(self.l2 > 0, f"probe.l2={self.l2} must be above 0")
        at_least("probe.num_resamples", self.num_resamples, minimum=10)
        keys = ("sem_layers", "sem_pooling", "core_layer", "core_pooling")
        named = [f"probe.{key}" for key in keys if getattr(self, key)]
        by_hand = self.choice == "by_hand"
        require(
            not named or by_hand,
            f"{', '.join(named)}: given by hand, but probe.choice={self.choice}; pass probe.choice=by_hand",
        )
        require(
            bool(named) or not by_hand,
            f"probe.choice=by_hand, but none of {', '.join(f'probe.{key}' for key in keys)} is given",
        )
        for layer in self.sem_layers:
            at_least("probe.sem_layers", layer, minimum=1)
        at_least("probe.core_layer", self.core_layer, minimum=1)
        require(
            len(set(self.sem_layers)) == len(self.sem_layers),
            f"probe.sem_layers={list(self.sem_layers)} names a layer twice",
        )


@dataclass
class EmbedConfig:
    """What 'prefgen predict --stage probe' writes."""

    out: str = "${workdir}/embeddings"
    """Folder of the embedding shards; an older set there is replaced."""
    num_draws: int = 8
    """Reference draws a user."""
    num_references: int = 8
    """References of either side in a draw; a side keeps at least a quarter of its images as targets."""
    sparse_share: float = 0.25
    """Share of the draws, the last ones, with few references: 1 to num_references liked ones and, in half of
    them, no disliked ones. A profile may be built from a single image."""
    users_per_pass: int = 16
    """Users embedded at a time."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if given(self.sparse_share):
            require(
                0 <= self.sparse_share < 1,
                f"embed.sparse_share={self.sparse_share} must be at least 0 and below 1",
            )
        for name in ("num_draws", "num_references", "users_per_pass"):
            at_least(f"embed.{name}", getattr(self, name), minimum=1)


@dataclass
class ProbeConfig(StageConfig):
    """Stage probe: linear probes over layers and poolings choose where core and sem are read."""

    run_dir: str = "${workdir}/probe"
    """Folder of this run."""
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(max_steps=400, gradient_clip_val=None)
    )
    data: ProbeDataConfig = field(default_factory=ProbeDataConfig)
    model: ProbeModelConfig = field(default_factory=ProbeModelConfig)
    probe: ProbeSectionConfig = field(default_factory=ProbeSectionConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)

    def __post_init__(self) -> None:
        """Refuse what would make one probe depend on another."""
        super().__post_init__()
        require(
            self.trainer.gradient_clip_val is None,
            f"trainer.gradient_clip_val={self.trainer.gradient_clip_val} would couple the probes of all "
            "cells; stage probe needs trainer.gradient_clip_val=null",
        )

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        """History shards, and stage vqa's LoRA unless it is switched off."""
        inputs = [history_shards(self.data.shards, workdir=self.workdir)]
        if self.model.lora:
            inputs.append(lora_folder(self.model.lora, workdir=self.workdir))
        return tuple(inputs)
