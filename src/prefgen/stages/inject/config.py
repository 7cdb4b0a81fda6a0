"""What can be set for stage inject. No torch here: the command line checks a config before anything heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefgen.config import DataConfig, RequiredInput, StageConfig, at_least, given, require
from prefgen.config_sections import FrozenDtype
from prefgen.inputs import embedding_shards, history_shards, pipeline_folder

PARTS = ("aligned", "core", "image")


@dataclass
class InjectDataConfig(DataConfig):
    """Where pictures and embeddings come from and what is held in memory."""

    batch_size: int = 32
    """Images per step and device."""
    shards: str = "${workdir}/shards"
    """Folder of history shards, written by 'prefgen data build'."""
    embeddings: str = "${workdir}/embeddings"
    """Folder of embedding shards, written by 'prefgen predict --stage probe'."""
    image_size: int | None = None
    """Pixels on a side of the targets; null takes the pipeline's own."""
    max_aspect_ratio: float = 1.0
    """Largest ratio of a target's sides. Above 1 targets keep their shape as nearly as sizes of about the
    same number of pixels allow, and a batch holds one size; 1 cuts all to the pipeline's shape."""
    encoded: str | None = None
    """Folder of latents and texts, written by 'prefgen data encode'; null encodes while training."""
    cache: Literal["memory", "disk"] = "memory"
    """Hold all users' encoded pictures and embeddings in memory, or read each when it is needed."""
    cache_latents: bool = True
    """Encode each picture once, by itself, and keep its latents in memory: pays off when a picture comes
    up several times in the run."""
    cache_text: bool = True
    """Encode each prompt once, by itself, and keep the result in memory: pays off when prompts repeat."""
    max_cached: int = 20000
    """At most so many pictures, and so many prompts, are kept; further ones are encoded each time."""
    max_users: int = 0
    """Train on only the first so many users; 0 means all."""
    max_eval_users: int = 128
    """At most so many unseen users are measured."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        at_least("data.image_size", self.image_size, minimum=8)
        at_least("data.max_aspect_ratio", self.max_aspect_ratio, minimum=1)
        at_least("data.max_cached", self.max_cached, minimum=0)
        at_least("data.max_users", self.max_users, minimum=0)
        at_least("data.max_eval_users", self.max_eval_users, minimum=2)


@dataclass
class InjectModelConfig:
    """The frozen pipeline and what the user adapter is fed with."""

    pipeline: str = "asset:mini/pipeline"
    """Folder of the diffusers pipeline."""
    image_encoder: str | None = None
    """Folder of a CLIP image encoder for pipelines that ship none; null takes the pipeline's own."""
    projector: str = "${workdir}/align/projector.safetensors"
    """Artefact of stage align; not needed where model.parts leaves out aligned."""
    parts: tuple[str, ...] = PARTS
    """Rows of the fusion, four tokens each: aligned, core, image. A part may come more than once:
    image,image,image is the image-only adapter with as many tokens."""
    init_adapter: str | None = None
    """Adapter to start from: an IP-Adapter's .safetensors file, or one that prefgen wrote; null starts from
    the frozen text projections. Parts that the file does not know start as if nothing was known."""
    aligned_start: Literal["text", "random"] = "text"
    """Tokens of the aligned part start as the aligned embedding itself, or behind a random Linear like those
    of the other parts. Without effect where its width is not that of the UNet's text, as SDXL's, and with
    model.init_adapter."""
    frozen_dtype: FrozenDtype = "float32"
    """Number format of the frozen pipeline; auto is bfloat16 where the device multiplies it in hardware, else
    float32."""
    vae_dtype: FrozenDtype = "float32"
    """Number format of the VAE, as model.frozen_dtype; SDXL's overflows in float16."""
    memory_format: Literal["contiguous", "channels_last"] = "channels_last"
    """Layout of the convolutions; channels_last is the faster one on CPUs and new GPUs."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of storing them."""
    text_lora_rank: int = 0
    """Rank of a LoRA on the text cross-attention, trained along and in force only where users are; 0 trains
    none. Written beside the adapter."""

    def __post_init__(self) -> None:
        """Check the parts."""
        at_least("model.text_lora_rank", self.text_lora_rank, minimum=0)
        if given(*self.parts):
            unknown = [part for part in self.parts if part not in PARTS]
            require(not unknown, f"model.parts: {unknown[:1]} is not one of {', '.join(PARTS)}")
            require(len(self.parts) > 0, f"model.parts is empty; name some of {', '.join(PARTS)}")


@dataclass
class InjectLossConfig:
    """What is dropped, how timesteps weigh, and which pictures are drawn while training."""

    user_drop_rate: float = 0.05
    """Rate at which the user alone is dropped (all parts)."""
    text_drop_rate: float = 0.05
    """Rate at which the prompt alone is dropped."""
    both_drop_rate: float = 0.05
    """Rate at which user and prompt are dropped together."""
    part_drop_rate: float = 0.1
    """Rate at which each part is dropped by itself, independently of the others."""
    timestep_draws: float = 1.0
    """A training timestep is the noisiest of so many uniform draws (1: uniform; fractions are allowed). What
    a user decides, background and frame and colours, is settled in the noisy half."""
    min_snr_gamma: float | None = None
    """Bound on a timestep's weight in signal-to-noise ratio, e.g. 5; null weighs all alike."""
    noise_offset: float = 0.0
    """Standard deviation of a shift common to all places of a channel, added to the noise: pictures of very
    dark or light mean become easier. Of no use with zero terminal signal-to-noise ratio."""
    sample_every_n_steps: int = 500
    """Draw the picture grid at the first validation after so many more steps; 0 never does."""
    num_sample_users: int = 3
    """Unseen users in the grid, beside the base model."""
    num_sample_prompts: int = 4
    """Prompts in the grid."""
    sample_steps: int = 20
    """Denoising steps of the grid's pictures."""
    sample_guidance: float = 3.0
    """Classifier-free guidance of the grid's pictures."""

    def __post_init__(self) -> None:
        """Check ranges and that the exclusive drops leave something to learn from."""
        rates = ("user_drop_rate", "text_drop_rate", "both_drop_rate")
        for name in (*rates, "part_drop_rate"):
            value = getattr(self, name)
            if given(value):
                require(0 <= value < 1, f"inject.{name}={value} must be at least 0 and below 1")
        values = [getattr(self, name) for name in rates]
        if given(*values):
            named = " + ".join(f"inject.{name}" for name in rates)
            require(sum(values) < 1, f"{named} = {sum(values):g} must be below 1")
        if given(self.timestep_draws):
            require(self.timestep_draws > 0, f"inject.timestep_draws={self.timestep_draws} must be above 0")
        if self.min_snr_gamma is not None and given(self.min_snr_gamma):
            require(self.min_snr_gamma > 0, f"inject.min_snr_gamma={self.min_snr_gamma} must be above 0")
        at_least("inject.noise_offset", self.noise_offset, minimum=0)
        at_least("inject.sample_every_n_steps", self.sample_every_n_steps, minimum=0)
        for name in ("num_sample_users", "num_sample_prompts", "sample_steps"):
            at_least(f"inject.{name}", getattr(self, name), minimum=1)


@dataclass
class InjectConfig(StageConfig):
    """Stage inject: fusion and user cross-attention of a frozen diffusion model."""

    run_dir: str = "${workdir}/inject"
    """Folder of this run."""
    data: InjectDataConfig = field(default_factory=InjectDataConfig)
    model: InjectModelConfig = field(default_factory=InjectModelConfig)
    inject: InjectLossConfig = field(default_factory=InjectLossConfig)

    def __post_init__(self) -> None:
        """Refuse a layout that cannot be sharded."""
        super().__post_init__()
        require(
            self.trainer.strategy != "fsdp2" or self.model.memory_format == "contiguous",
            f"trainer.strategy=fsdp2 needs model.memory_format=contiguous, got {self.model.memory_format}",
        )

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        """Pictures, embeddings, the pipeline and, where aligned is used, the projector."""
        inputs = [
            history_shards(self.data.shards, workdir=self.workdir),
            embedding_shards(self.data.embeddings, workdir=self.workdir),
            pipeline_folder(self.model.pipeline),
        ]
        if "aligned" in self.model.parts:
            inputs.append(
                RequiredInput(
                    key="model.projector",
                    path=self.model.projector,
                    what="projector",
                    made_by=f"prefgen fit --stage align workdir={self.workdir}",
                )
            )
        if self.data.encoded is not None:
            inputs.append(
                RequiredInput(
                    key="data.encoded",
                    path=self.data.encoded,
                    what="encoded shards",
                    made_by=f"prefgen data encode --out {self.data.encoded} workdir={self.workdir}",
                    member="index.json",
                )
            )
        if self.model.init_adapter is not None:
            inputs.append(
                RequiredInput(
                    key="model.init_adapter",
                    path=self.model.init_adapter,
                    what="adapter",
                    made_by="prefgen export --format ip-adapter",
                )
            )
        return tuple(inputs)
