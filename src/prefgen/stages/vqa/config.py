"""What can be set for stage vqa. No torch here: the command line checks a config before anything heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefgen.config import DataConfig, RequiredInput, StageConfig, at_least, given, require
from prefgen.inputs import history_shards, mllm_folder


@dataclass
class VQADataConfig(DataConfig):
    """Where histories come from and how references are drawn."""

    batch_size: int = 16
    """Users per step and device; each brings one history and all its questions."""
    shards: str = "${workdir}/shards"
    """Folder of history shards, written by 'prefgen data build'."""
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
        at_least("data.eval_references", self.eval_references, minimum=1)
        at_least("data.eval_queries", self.eval_queries, minimum=1)
        at_least("data.max_users", self.max_users, minimum=0)
        at_least("data.max_eval_users", self.max_eval_users, minimum=0)


@dataclass
class VQAModelConfig:
    """The frozen MLLM and the LoRA put into its language model."""

    mllm: str = "asset:mini/mllm"
    """Folder or hub id of the multimodal LLM."""
    attention: Literal["eager", "sdpa"] = "eager"
    """Attention code; eager is the faster one on a CPU, sdpa on a GPU."""
    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights."""
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
    max_listed: int = 12
    """Most attributes in one answer; longer lists are cut to a random part."""
    loss: Literal["token", "question"] = "question"
    """Average over answer tokens, or over questions, so that long lists do not drown Yes and No."""
    first_token_weight: float = 2.0
    """Weight of the loss of an answer's first token among its own tokens."""
    num_listed_users: int = 16
    """Unseen users whose lists of likes and of dislikes are generated and checked in validation."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = {name: getattr(self, name) for name in ("like", "choose", "likes", "dislikes")}
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
        require(self.first_token_weight > 0, "questions.first_token_weight must be above 0")


@dataclass
class VQAConfig(StageConfig):
    """Stage vqa: LoRA on a frozen multimodal LLM by questions about what unseen users like."""

    run_dir: str = "${workdir}/vqa"
    """Folder of this run."""
    data: VQADataConfig = field(default_factory=VQADataConfig)
    model: VQAModelConfig = field(default_factory=VQAModelConfig)
    questions: VQAQuestionsConfig = field(default_factory=VQAQuestionsConfig)

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        """History shards, and the MLLM if it is a shipped one."""
        inputs = [history_shards(self.data.shards, workdir=self.workdir)]
        if self.model.mllm.startswith("asset:"):
            inputs.append(mllm_folder(self.model.mllm))
        return tuple(inputs)
