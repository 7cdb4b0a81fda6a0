"""Configuration of the toy stage; imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from prefgen.config import (
    MISSING,
    DataConfig,
    RequiredInput,
    StageConfig,
    TrainerConfig,
    given,
    require,
)


@dataclass
class ToySection:
    """Every kind of value."""

    width: int = 3
    """Width of the
    trained layer."""
    factor: float = 1.0
    """Factor on the loss."""
    name: str = "plain"
    """Any text."""
    maybe: str | None = None
    """Text or nothing."""
    colour: Literal["red", "green"] = "red"
    """One of two."""
    sizes: tuple[int, ...] = (1, 2)
    """Several numbers."""
    switch: bool = False
    """A switch."""

    def __post_init__(self) -> None:
        if given(self.width, self.factor):
            require(self.width >= self.factor, f"toy.width={self.width} < toy.factor={self.factor}")


@dataclass
class ToyDataConfig(DataConfig):
    """Input."""

    batch_size: int = 2
    """Samples."""
    shards: str = "${workdir}/shards"
    """Folder of shards."""


@dataclass
class ToyConfig(StageConfig):
    """The toy stage."""

    run_dir: str = "${workdir}/toy"
    """Folder of this run."""
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(
            accelerator="cpu", precision="32-true", max_steps=6, log_every_n_steps=1
        )
    )
    data: ToyDataConfig = field(default_factory=ToyDataConfig)
    toy: ToySection = field(default_factory=ToySection)

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        return (
            RequiredInput(
                key="data.shards",
                path=self.data.shards,
                what="embedding shards",
                made_by=f"prefgen predict --stage probe workdir={self.workdir}",
                member="index.json",
            ),
        )


@dataclass
class NeedyConfig(ToyConfig):
    """Has a key without a default."""

    needed: int = MISSING
    """Must be given."""
