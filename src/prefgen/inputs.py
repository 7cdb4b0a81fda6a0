"""What stages read from each other, and the command that makes each: one wording for every stage's answer."""

from __future__ import annotations

from prefgen.config import RequiredInput

SMOL_MLLM = "work/smol/mllm"
"""Where 'make smol' builds the MLLM of the preset smol."""


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


def mllm_folder(path: str) -> tuple[RequiredInput, ...]:
    """A multimodal LLM in a folder (``model.mllm``); nothing for a hub id, which ``from_pretrained`` finds.

    A hub id is OWNER/NAME; what is written with more or fewer parts can be a folder only.
    """
    shipped = path.startswith("asset:")
    if not shipped and path.count("/") == 1 and not path.startswith(("/", ".")):
        return ()
    made_by = "make smol" if path == SMOL_MLLM else f"hf download REPO --local-dir {path}"
    return (
        RequiredInput(
            key="model.mllm",
            path=path,
            what="multimodal LLM",
            made_by="make foundation" if shipped else made_by,
            member="config.json",
        ),
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
