"""What stages read from each other, and the command that makes each: one wording for every stage's answer."""

from __future__ import annotations

from prefgen.config import RequiredInput


def history_shards(path: str, *, workdir: str) -> RequiredInput:
    """Histories as shards (``data.shards``)."""
    return RequiredInput(
        key="data.shards",
        path=path,
        what="history shards",
        made_by=f"prefgen data build --history {workdir}/raw/history.jsonl --out {path}",
        member="index.json",
    )


def embedding_shards(path: str, *, workdir: str) -> RequiredInput:
    """What stage probe predicts (``data.embeddings``)."""
    return RequiredInput(
        key="data.embeddings",
        path=path,
        what="embedding shards",
        made_by=f"prefgen predict --stage probe workdir={workdir}",
        member="index.json",
    )


def mllm_folder(path: str) -> RequiredInput:
    """A multimodal LLM that ships with prefgen (``model.mllm``)."""
    return RequiredInput(
        key="model.mllm",
        path=path,
        what="multimodal LLM",
        made_by="make foundation",
        member="config.json",
    )


def pipeline_folder(path: str) -> RequiredInput:
    """A diffusers pipeline folder (``model.pipeline``)."""
    return RequiredInput(
        key="model.pipeline",
        path=path,
        what="diffusers pipeline",
        made_by="make foundation" if path.startswith("asset:") else f"hf download REPO --local-dir {path}",
        member="model_index.json",
    )


def lora_folder(path: str, *, workdir: str) -> RequiredInput:
    """Stage vqa's artefact (``model.lora``)."""
    return RequiredInput(
        key="model.lora",
        path=path,
        what="LoRA",
        made_by=f"prefgen fit --stage vqa workdir={workdir}",
        member="adapter_model.safetensors",
    )
