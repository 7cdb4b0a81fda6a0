"""What can be set for stage vqa. No torch here: the command line checks a config before anything heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefgen.config import DataConfig, RequiredInput, StageConfig, at_least, given, require
from prefgen.config_mllm import MLLMConfig
from prefgen.inputs import history_shards, mllm_folder


@dataclass
class VQADataConfig(DataConfig):
    """Where histories come from and how references are drawn."""

    batch_size: int = 16
    """Users per step and device; each brings one history and all its questions."""
    shards: str = "${workdir}/shards"
    """Folder of history shards, written by 'prefgen data build'."""
    max_batch_tokens: int = 0
    """Most tokens in one packed training batch, padding included: it takes as many users as fit,
    data.batch_size at most, and users of like length stand together. 0 sets no limit."""
    num_liked: tuple[int, int] = (2, 8)
    """Fewest and most liked references in training, drawn anew each epoch."""
    num_disliked: tuple[int, int] = (2, 8)
    """Fewest and most disliked references in training."""
    empty_side_rate: float = 0.1
    """How often one of the two sides is left empty in training."""
    eval_references: int = 8
    """References of either side in validation and test."""
    eval_queries: int = 8
    """Like-or-dislike questions a user in validation and test."""
    reference_counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """References of either side at which 'prefgen test' measures like or dislike, as far as they go."""
    cache_features: Literal["memory", "none"] = "memory"
    """Encode every image once and keep the features, or encode the images of each batch."""
    feature_cache: str = "${workdir}/features"
    """Folder where stages vqa and probe share those features; empty keeps them in memory only."""
    max_users: int = 0
    """Train on only the first so many users; 0 means all."""
    max_eval_users: int = 128
    """Validate and test on only the first so many users; 0 means all."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        for side in ("num_liked", "num_disliked"):
            low, high = getattr(self, side)
            require(0 <= low <= high, f"data.{side}=({low}, {high}) must be (fewest, most) with 0 <= fewest")
        require(
            self.num_liked[1] + self.num_disliked[1] > 0,
            "data.num_liked and data.num_disliked both end at 0: a history needs an image",
        )
        if given(self.empty_side_rate):
            require(
                0 <= self.empty_side_rate <= 1,
                f"data.empty_side_rate={self.empty_side_rate} must lie between 0 and 1",
            )
        at_least("data.max_batch_tokens", self.max_batch_tokens, minimum=0)
        for count in self.reference_counts:
            at_least("data.reference_counts", count, minimum=1)
        at_least("data.eval_references", self.eval_references, minimum=1)
        at_least("data.eval_queries", self.eval_queries, minimum=1)
        at_least("data.max_users", self.max_users, minimum=0)
        at_least("data.max_eval_users", self.max_eval_users, minimum=0)


@dataclass
class VQAModelConfig(MLLMConfig):
    """The frozen MLLM and the LoRA put into its language model."""

    gradient_checkpointing: bool = False
    """Compute each decoder layer a second time in the backward pass instead of keeping what is inside it."""
    lora_rank: int = 8
    """Rank of LoRA."""
    lora_alpha: int = 16
    """LoRA's scale is alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout in front of LoRA."""
    lora_targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers of the language model that get LoRA."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require(
            not (self.gradient_checkpointing and self.attention.startswith("flash")),
            f"model.gradient_checkpointing=true does not go with model.attention={self.attention}, where "
            "questions share cached keys and values; use model.attention=sdpa",
        )
        at_least("model.lora_rank", self.lora_rank, minimum=1)
        at_least("model.lora_alpha", self.lora_alpha, minimum=1)
        require(0 <= self.lora_dropout < 1, f"model.lora_dropout={self.lora_dropout} must lie in [0, 1)")
        require(len(self.lora_targets) > 0, "model.lora_targets is empty: nothing would train")


@dataclass
class VQAQuestionsConfig:
    """Which questions stand behind one history."""

    like: int = 6
    """Like-or-dislike questions, each with an image of its own."""
    choose: int = 1
    """Which of two images would this user choose."""
    likes: int = 1
    """What does this user like: 0 or 1."""
    dislikes: int = 1
    """What does this user dislike: 0 or 1."""
    score: int = 0
    """Score-for-this-image questions, answered + or -, each with an image of its own."""
    max_listed: int = 12
    """Most attributes in one answer; longer lists are cut to a random part."""
    loss: Literal["token", "question"] = "question"
    """Average over answer tokens, or over questions, so that long lists do not drown Yes and No."""
    first_token_weight: float = 2.0
    """Weight of the loss of an answer's first token among its own tokens."""
    contrastive_weight: float = 0.0
    """Weight of a loss over every pair of a liked and a disliked image asked about behind one history: the
    liked one's Yes should beat the disliked one's. 0 leaves it out."""
    num_listed_users: int = 16
    """Unseen users whose lists of likes and of dislikes are generated and checked in validation."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = {name: getattr(self, name) for name in ("like", "choose", "score", "likes", "dislikes")}
        for name, count in counts.items():
            at_least(f"questions.{name}", count, minimum=0)
        for name in ("likes", "dislikes"):
            require(counts[name] <= 1, f"questions.{name}={counts[name]} must be 0 or 1")
        require(
            sum(counts.values()) > 0,
            f"questions: all of {', '.join(counts)} are 0, so nothing would be asked; set one above 0",
        )
        at_least("questions.max_listed", self.max_listed, minimum=1)
        at_least("questions.num_listed_users", self.num_listed_users, minimum=0)
        at_least("questions.contrastive_weight", self.contrastive_weight, minimum=0)
        require(
            not self.contrastive_weight or self.like >= 2,
            f"questions.contrastive_weight={self.contrastive_weight} compares two like-or-dislike questions "
            f"behind one history; set questions.like={self.like} to 2 or more",
        )
        require(self.first_token_weight > 0, "questions.first_token_weight must be above 0")


@dataclass
class VQAConfig(StageConfig):
    """Stage vqa: LoRA on a frozen multimodal LLM by questions about what unseen users like."""

    run_dir: str = "${workdir}/vqa"
    """Folder of this run."""
    data: VQADataConfig = field(default_factory=VQADataConfig)
    model: VQAModelConfig = field(default_factory=VQAModelConfig)
    questions: VQAQuestionsConfig = field(default_factory=VQAQuestionsConfig)

    def __post_init__(self) -> None:
        """Refuse what 4-bit weights do not survive."""
        super().__post_init__()
        require(
            self.model.quantization == "none" or self.trainer.precision != "bf16-true",
            "trainer.precision=bf16-true would turn 4-bit weights into bf16; with "
            f"model.quantization={self.model.quantization} use trainer.precision=bf16-mixed",
        )

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        """History shards, and the MLLM unless it is a hub id."""
        return (history_shards(self.data.shards, workdir=self.workdir), *mllm_folder(self.model.mllm))
