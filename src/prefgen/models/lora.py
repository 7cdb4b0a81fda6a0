"""LoRA on the language model of an MLLM, in peft's format."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from prefgen.errors import CheckpointError
from prefgen.models.mllm import MLLM

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS_NAME = "adapter_model.safetensors"
LINEAGE_NAME = "prefgen.json"


def add_lora(
    mllm: MLLM,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = LORA_TARGETS,
) -> PeftModel:
    """Freeze the model and put trainable LoRA into the linear layers of its language model.

    The layers are replaced in place: ``mllm`` goes on working, now with LoRA. The wrapper returned is what
    ``save_pretrained`` is called on. LoRA starts as the identity, so nothing changes before training.

    Raises:
        CheckpointError: no linear layer of the language model has one of these names.
    """
    pattern = rf".*{mllm.family.text}\.layers\.\d+\..*\.({'|'.join(targets)})"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, bias="none")
    try:
        with _own_warnings_only():
            return get_peft_model(mllm.model, config)
    except ValueError as error:
        raise CheckpointError(f"no layer of the language model is called {', '.join(targets)}") from error


def load_lora(mllm: MLLM, *, path: str | Path, mllm_hash: str | None = None) -> PeftModel:
    """Put a saved LoRA into the model, frozen, ready for use.

    Args:
        mllm: the model; its layers are replaced in place.
        path: the LoRA's folder.
        mllm_hash: hash of the model's folder; None, or a LoRA that names no model, leaves it unchecked.

    Raises:
        CheckpointError: no LoRA there, it does not fit this model, or it was trained on another one.
    """
    if not (Path(path) / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"no LoRA at {path}: expected {WEIGHTS_NAME} and adapter_config.json in it")
    trained_on = _trained_on(Path(path))
    if mllm_hash is not None and trained_on not in (None, mllm_hash):
        raise CheckpointError(
            f"the LoRA at {path} was trained on another MLLM ({str(trained_on)[:12]}, this one is "
            f"{mllm_hash[:12]}); run 'prefgen fit --stage vqa' again or pass the MLLM it belongs to"
        )
    try:
        with _own_warnings_only():
            return PeftModel.from_pretrained(mllm.model, path, is_trainable=False).eval()
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the LoRA at {path} does not fit this model: {reason}") from error


def save_lora(model: PeftModel, *, path: Path, mllm_hash: str | None = None) -> Path:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``: the trained part only.

    With ``mllm_hash`` a small json beside them says which model it was trained on. The folder comes into
    place whole, an older one leaves it then: never weights of one training beside the lineage of another.
    """
    part, old = (path.with_name(f".{path.name}.{word}") for word in ("part", "old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(part, save_embedding_layers=False)
    (part / "README.md").unlink(missing_ok=True)
    _forget_path(part / "adapter_config.json")
    if mllm_hash is not None:
        (part / LINEAGE_NAME).write_text(json.dumps({"mllm": mllm_hash}) + "\n", encoding="utf-8")
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    return path


def _forget_path(config: Path) -> None:
    """Drop where the base model lay, a path of the machine that trained; saving, peft fills it in anew."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = None
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _trained_on(path: Path) -> str | None:
    try:
        found = json.loads((path / LINEAGE_NAME).read_text(encoding="utf-8"))["mllm"]
        return str(found)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path / LINEAGE_NAME} is damaged; run 'prefgen fit --stage vqa' again"
        ) from None


@contextlib.contextmanager
def _own_warnings_only() -> Iterator[None]:
    """Without the warning that peft 0.21 raises by asking transformers 5 for a property of its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield
