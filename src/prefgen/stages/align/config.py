"""What can be set for stage align. No torch here: the command line checks a config before anything heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefgen.config import DataConfig, RequiredInput, StageConfig, at_least, given, require
from prefgen.config_sections import FrozenDtype
from prefgen.inputs import embedding_shards, pipeline_folder


@dataclass
class AlignDataConfig(DataConfig):
    """Where the embeddings come from and how they are held."""

    batch_size: int = 128
    """Users per step and device: whole groups of align.group_size."""
    embeddings: str = "${workdir}/embeddings"
    """Folder of embedding shards, written by 'prefgen predict --stage probe'."""
    cache: Literal["memory", "disk"] = "memory"
    """Hold all sem embeddings in memory, or read each from disk when it is needed."""
    orders_per_user: int = 8
    """Attribute lists encoded per user before training, each in an order of its own."""
    max_users: int = 0
    """Train on only the first so many users; 0 means all."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        at_least("data.orders_per_user", self.orders_per_user, minimum=1)
        at_least("data.max_users", self.max_users, minimum=0)


@dataclass
class AlignModelConfig:
    """The projector and the frozen text space it maps into."""

    pipeline: str = "asset:mini/pipeline"
    """Folder of the diffusers pipeline whose text encoder defines the space."""
    text_encoder: Literal["text_encoder", "text_encoder_2"] = "text_encoder"
    """Which of the pipeline's text encoders (SDXL has two)."""
    text_pooling: Literal["pooled", "mean_tokens"] = "pooled"
    """One vector a text: the encoder's own pooled one, or the mean over the text's tokens."""
    hidden_width: int = 512
    """Width between the projector's two linear layers."""
    frozen_dtype: FrozenDtype = "float32"
    """Number format of the frozen text encoder; auto is bfloat16 where the device multiplies it in hardware,
    else float32."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("model.hidden_width", self.hidden_width, minimum=1)


@dataclass
class AlignLossConfig:
    """What the loss compares, in groups of what size, under which kernel."""

    pairing: Literal["same_users", "independent", "permuted"] = "same_users"
    """Whose texts stand on the other side of a group: its own users', other users', or, as a control,
    one fixed wrong user's each."""
    group_size: int = 16
    """Users per MMD; a batch is the mean over its groups. Full batches hardly see who is who."""
    kernel: Literal["gaussian", "laplacian", "rq", "imq", "energy"] = "gaussian"
    """Kernel of the MMD."""
    bandwidth: str = "mean"
    """'mean' or 'median' distance of the training texts, frozen before the first step, or a number."""
    multipliers: tuple[float, ...] = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)
    """Factors on the bandwidth; the kernel is the mean over them."""
    estimator: Literal["biased", "unbiased", "ustat"] = "biased"
    """Estimator within a group. With the same users on both sides biased is 0 exactly where the sets agree;
    unbiased is negative there and pushes users apart, ustat leaves out each user's own pair."""
    mmd_weight: float = 1.0
    """Weight of MMD^2."""
    mse_weight: float = 0.0
    """Weight of the squared distance to the own text, in units of the texts' spread."""
    cosine_weight: float = 0.0
    """Weight of one minus the cosine to the own text, both seen from the texts' mean."""
    infonce_weight: float = 0.0
    """Weight of the cross-entropy of finding the own text among the group's."""
    infonce_temperature: float = 0.07
    """Temperature of that cross-entropy."""
    sliced_wasserstein_weight: float = 0.0
    """Weight of the squared sliced Wasserstein distance between a group and its texts, in units of the texts'
    spread. It compares sets, as the MMD does, and sees the same texts (align.pairing)."""
    sliced_wasserstein_projections: int = 64
    """Random directions of that distance, drawn anew at each step."""

    def __post_init__(self) -> None:
        """Check sizes, weights and the bandwidth's spelling."""
        at_least("align.group_size", self.group_size, minimum=2)
        weights = [f"{name}_weight" for name in ("mmd", "mse", "cosine", "infonce", "sliced_wasserstein")]
        for name in weights:
            at_least(f"align.{name}", getattr(self, name), minimum=0)
        require(
            any(not given(value := getattr(self, name)) or value > 0 for name in weights),
            f"align: all of {', '.join(weights)} are 0, so nothing would be learned; set one above 0, or, to "
            "leave the projector as it starts, pass optim.learning_rate=0 trainer.max_steps=1",
        )
        require(
            len(self.multipliers) > 0 and min(self.multipliers) > 0,
            f"align.multipliers: {list(self.multipliers)} must be numbers above 0",
        )
        at_least("align.infonce_temperature", self.infonce_temperature, minimum=1e-4)
        projections = self.sliced_wasserstein_projections
        at_least("align.sliced_wasserstein_projections", projections, minimum=1)
        if given(self.bandwidth):
            require(
                _is_bandwidth(self.bandwidth),
                f"align.bandwidth: {self.bandwidth!r} is not mean, median or a number above 0",
            )


def _is_bandwidth(text: str) -> bool:
    try:
        return text in ("mean", "median") or 0 < float(text) < float("inf")
    except ValueError:
        return False


@dataclass
class AlignEvaluationConfig:
    """What is measured on unseen users."""

    max_users: int = 256
    """At most so many unseen users are measured."""
    num_neighbours: int = 10
    """Neighbours of a user whose survival is measured."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("evaluation.max_users", self.max_users, minimum=2)
        at_least("evaluation.num_neighbours", self.num_neighbours, minimum=1)


@dataclass
class AlignConfig(StageConfig):
    """Stage align: sem embeddings of users brought into the text space of their liked attributes."""

    run_dir: str = "${workdir}/align"
    """Folder of this run."""
    data: AlignDataConfig = field(default_factory=AlignDataConfig)
    model: AlignModelConfig = field(default_factory=AlignModelConfig)
    align: AlignLossConfig = field(default_factory=AlignLossConfig)
    evaluation: AlignEvaluationConfig = field(default_factory=AlignEvaluationConfig)

    def __post_init__(self) -> None:
        """Check that a batch consists of whole groups."""
        super().__post_init__()
        batch, group = self.data.batch_size, self.align.group_size
        if given(batch, group):
            require(
                batch % group == 0,
                f"data.batch_size={batch} must be a multiple of align.group_size={group}, "
                "so that a batch holds whole groups",
            )

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        """Embedding shards, and the pipeline whose text space is the goal."""
        return (
            embedding_shards(self.data.embeddings, workdir=self.workdir),
            pipeline_folder(self.model.pipeline),
        )
