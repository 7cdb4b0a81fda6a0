"""What can be set for ``prefgen evaluate``. No torch here: it is checked before anything heavy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from prefgen.config import RequiredInput, at_least, build_config, given, preset_file, require, resolve_path
from prefgen.inputs import embedding_shards, history_shards, lora_folder, mllm_folder, pipeline_folder


@dataclass
class EvaluateDataConfig:
    """The unseen users."""

    shards: str = "${workdir}/shards"
    """Folder of history shards; the users of split test are evaluated."""
    embeddings: str = "${workdir}/embeddings"
    """Folder of embedding shards, written by 'prefgen predict --stage probe'."""
    feature_cache: str = "${workdir}/features"
    """Folder where image features are shared with stages vqa and probe, and where the base model's pictures
    and what the judge reads on known drawings wait for the next evaluation; empty keeps nothing."""


@dataclass
class EvaluateModelConfig:
    """The trained artefacts, the models below them, and the judge."""

    pipeline: str = "asset:mini/pipeline"
    """Folder of the diffusers pipeline."""
    image_encoder: str | None = None
    """Folder of a CLIP image encoder for pipelines that ship none; null takes the pipeline's own."""
    mllm: str = "asset:mini/mllm"
    """Folder or hub id of the multimodal LLM."""
    judge: str = "asset:mini/judge.safetensors"
    """The judge: reads subject and attributes, and trained none of the models here."""
    lora: str = "${workdir}/vqa/lora"
    """Artefact of stage vqa."""
    probe: str = "${workdir}/probe/probe.json"
    """Artefact of stage probe; its heat maps lie beside it."""
    align: str = "${workdir}/align"
    """Run folder of stage align, with its projector."""
    align_independent: str = "${workdir}/align_independent"
    """Run folder of a second fit of align with align.pairing=independent; reported as missing if absent."""
    inject: str = "${workdir}/inject"
    """Run folder of stage inject, with its user adapter."""
    inject_image_only: str = "${workdir}/inject_image_only"
    """Run folder of the separate image-only adapter; empty leaves the comparison out."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Arithmetic of UNet and MLLM; auto is bfloat16 where the device multiplies it in hardware;
    text encoder, VAE and judge always work in float32."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where MLLM and pipeline work; auto is a GPU where there is one. The judge works on the CPU."""
    memory_format: Literal["contiguous", "channels_last"] = "channels_last"
    """Layout of the convolutions."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention code of model.mllm and extra.mllm_judge; the flash ones need their package, a GPU and
    model.precision=bfloat16."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 holds the linear layers of both in 4 bits (QLoRA; needs prefgen[qlora]), as in stages vqa and
    probe."""

    def __post_init__(self) -> None:
        """Check relations."""
        require(
            not (self.attention.startswith("flash") and self.precision == "float32"),
            f"model.attention={self.attention} takes half precision only; set model.precision=bfloat16",
        )


@dataclass
class EvaluateSection:
    """How many users, pictures and questions."""

    num_users: int = 64
    """Test users to draw for; fewer if there are fewer."""
    num_prompts: int = 2
    """Prompts a user, each drawn under every condition from the same noise."""
    num_draws: int = 1
    """Reference draws whose mean is the profile; the pictures of a draw's references are not shown again."""
    user_scale: float = 1.0
    """Strength of the user branch."""
    num_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 or less switches it off."""
    batch_size: int = 64
    """Pictures drawn at a time; another number may change last bits."""
    num_questions: int = 8
    """Like-or-dislike questions a user."""
    num_references: int = 8
    """Liked and disliked images each behind a question."""
    max_asked_users: int = 0
    """Ask about only the first so many test users; 0 means all."""
    max_judged_images: int = 1000
    """Drawings of test users on which the judge itself is measured, clean and restored by the VAE. Where one
    in twelve shows an attribute, 1000 tell its accuracy to within .09 around .8 (95 %), 2000 to .06."""
    minimum_accuracy: float = 0.8
    """Attributes the judge reads less often on the VAE round trip leave the judged set."""
    num_resamples: int = 2000
    """Bootstrap resamplings of users behind each interval."""
    num_shown_users: int = 4
    """Users shown in the report, the first ones of the split."""
    num_worst_users: int = 3
    """Users shown because their own pictures gained least over the base model's."""
    attribution: str = ""
    """A line about who made the pictures, for the report."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("evaluate.num_users", self.num_users, minimum=2)
        for name in ("num_prompts", "num_draws", "num_steps", "batch_size", "num_questions"):
            at_least(f"evaluate.{name}", getattr(self, name), minimum=1)
        for name in ("num_references", "max_judged_images"):
            at_least(f"evaluate.{name}", getattr(self, name), minimum=1)
        for name in ("max_asked_users", "num_shown_users", "num_worst_users"):
            at_least(f"evaluate.{name}", getattr(self, name), minimum=0)
        at_least("evaluate.num_resamples", self.num_resamples, minimum=100)
        if given(self.minimum_accuracy):
            require(
                0 <= self.minimum_accuracy <= 1,
                f"evaluate.minimum_accuracy={self.minimum_accuracy} must lie between 0 and 1",
            )


EXTRA_CONDITIONS = ("words_mllm", "image_mean", "image_minus", "feedback", "inversion")


@dataclass
class EvaluateExtraSection:
    """More than the plain report: everything here is off unless asked for."""

    conditions: tuple[str, ...] = ()
    """Rivals to draw as well, e.g. [feedback]: words_mllm, image_mean, image_minus, feedback, inversion."""
    figures: bool = False
    """Also margins with paired tests, attribute hits, CLIP-T, CLIP-I, FID, KID, CMMD, diversity, Elo and
    structure; writes users.json with every user's numbers."""
    save_pictures: bool = False
    """Write all pictures as PNG files into OUT/pictures, for 'prefgen evaluate humans' and galleries."""
    scorers: tuple[str, ...] = ()
    """Published scorers as [name:folder of weights]: dino, lpips, pickscore, hpsv2, imagereward, viper."""
    mllm_judge: str = ""
    """Folder of a multimodal LLM, another than model.mllm, that says of own and each other condition which
    picture the user would choose, in both orders, behind evaluate.num_references images of either side."""
    allow_own_mllm_judge: bool = False
    """Let extra.mllm_judge be model.mllm; the report then says that the judge is not independent."""
    dislike_weight: float = 0.5
    """image_minus: how much of the mean disliked embedding is taken off the mean liked one."""
    feedback_references: int = 4
    """feedback: at most so many references of either side."""
    feedback_weight: float = 0.8
    """feedback: weight of a reference's pixels beside the picture's own."""
    feedback_until: float = 0.6
    """feedback: share of the noise schedule, from the noisy end, in which references are looked at."""
    inversion_vectors: int = 4
    """inversion: learned token embeddings of each user."""
    inversion_steps: int = 200
    """inversion: steps of Adam for each user, one liked reference a step."""
    inversion_learning_rate: float = 5e-3
    """inversion: learning rate."""
    num_set_resamples: int = 100
    """Bootstrap resamplings behind the intervals of FID, KID and CMMD; 0 leaves the three out."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if given(*self.conditions):
            unknown = [name for name in self.conditions if name not in EXTRA_CONDITIONS]
            names = ", ".join(EXTRA_CONDITIONS)
            require(not unknown, f"extra.conditions: {unknown[:1]} is not one of {names}")
        for name in ("feedback_references", "inversion_vectors", "inversion_steps"):
            at_least(f"extra.{name}", getattr(self, name), minimum=1)
        at_least("extra.num_set_resamples", self.num_set_resamples, minimum=0)
        at_least("extra.dislike_weight", self.dislike_weight, minimum=0)
        at_least("extra.inversion_learning_rate", self.inversion_learning_rate, minimum=1e-8)
        if given(self.feedback_weight, self.feedback_until):
            require(self.feedback_weight > 0, f"extra.feedback_weight={self.feedback_weight} must be above 0")
            require(
                0 < self.feedback_until <= 1,
                f"extra.feedback_until={self.feedback_until} must be above 0 and at most 1",
            )
        for word in self.scorers if given(*self.scorers) else ():
            name, colon, folder = word.partition(":")
            require(bool(name and colon and folder), f"extra.scorers: expected name:folder, got {word!r}")


@dataclass
class EvaluateConfig:
    """Configuration of ``prefgen evaluate``."""

    workdir: str = "work/mini"
    """Folder in which the four stages were fitted."""
    out: str = "${workdir}/report"
    """Folder of metrics.json, timing.json and report.html; an older report there is replaced."""
    seed: int = 0
    """Seed of prompts, noise, who is whose other user, and of every interval."""
    num_threads: int | None = None
    """Threads of torch on the CPU; null leaves torch's own choice."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    model: EvaluateModelConfig = field(default_factory=EvaluateModelConfig)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    extra: EvaluateExtraSection = field(default_factory=EvaluateExtraSection)

    def __post_init__(self) -> None:
        """Check ranges, and that what is asked for has its adapter."""
        fed = [name for name in self.extra.conditions if name in ("image_mean", "image_minus")]
        if fed and given(self.model.inject_image_only):
            require(
                bool(self.model.inject_image_only),
                f"extra.conditions={fed[0]} needs model.inject_image_only, which is empty",
            )
        judge, own = self.extra.mllm_judge, self.model.mllm
        if judge and given(judge, own) and not self.extra.allow_own_mllm_judge:
            require(
                resolve_path(judge).resolve() != resolve_path(own).resolve(),
                f"extra.mllm_judge={judge} is model.mllm, from which stage vqa trained; name another "
                "multimodal LLM, or pass extra.allow_own_mllm_judge=true to have the report say that it is "
                "not independent",
            )
        at_least("num_threads", self.num_threads, minimum=1)
        at_least("seed", self.seed, minimum=0)

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        """Everything without which there is nothing to evaluate, in the order it is made."""
        model, work = self.model, f"workdir={self.workdir}"
        inputs = [history_shards(self.data.shards, workdir=self.workdir), *mllm_folder(model.mllm)]
        inputs += [
            pipeline_folder(model.pipeline),
            _needed("model.judge", model.judge, "judge", "make foundation"),
            lora_folder(model.lora, workdir=self.workdir),
            _needed("model.probe", model.probe, "probe.json", f"prefgen fit --stage probe {work}"),
            embedding_shards(self.data.embeddings, workdir=self.workdir),
            _needed("model.align", model.align, "projector", f"prefgen fit --stage align {work}"),
            _needed("model.inject", model.inject, "user adapter", f"prefgen fit --stage inject {work}"),
        ]
        if model.inject_image_only:
            fit = f"prefgen fit --stage inject --config configs/mini/inject_image_only.yaml {work}"
            inputs.append(
                _needed("model.inject_image_only", model.inject_image_only, "image-only adapter", fit)
            )
        if self.extra.mllm_judge:
            fetch = f"hf download REPO --local-dir {self.extra.mllm_judge}"
            judge = _needed("extra.mllm_judge", self.extra.mllm_judge, "multimodal LLM to judge", fetch)
            inputs.append(judge)
        return tuple(inputs)


_MEMBERS = {
    "projector": "projector.safetensors",
    "user adapter": "user_adapter.safetensors",
    "image-only adapter": "user_adapter.safetensors",
    "multimodal LLM to judge": "config.json",
}
"""The file that must lie in a run folder; judge and probe.json are files themselves."""


def _needed(key: str, path: str, what: str, made_by: str) -> RequiredInput:
    return RequiredInput(key=key, path=path, what=what, made_by=made_by, member=_MEMBERS.get(what, ""))


def load_evaluate_config(
    *, preset: str = "mini", file: Path | None = None, overrides: Iterable[str] = ()
) -> EvaluateConfig:
    """``prefgen.config.load_config`` for the evaluation.

    Raises:
        ConfigError: as there.
    """
    path = file if file is not None else preset_file("evaluate", preset=preset)
    kind = cast(Any, EvaluateConfig)  # no stage: it has no trainer, but its keys work in the same way
    return cast(
        EvaluateConfig, build_config(kind, where="for prefgen evaluate", file=path, overrides=overrides)
    )
