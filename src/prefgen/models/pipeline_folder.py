"""Reading a diffusers pipeline folder: its parts, quietly, and from safetensors alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prefgen.errors import DataError
from prefgen.models.loading import quiet_loading


def load_parts(path: str, *, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """The components of a pipeline by name, and ``zero_empty_text``.

    Args:
        path: folder or hub id.
        dtypes: by component; ``default`` for the others.

    Raises:
        DataError: nothing loadable there, or pickled weights only.
    """
    try:
        with _quiet():
            # Imported here: it takes seconds, and hints at torchvision unless quiet.
            from diffusers import DiffusionPipeline
            from diffusers.utils import is_accelerate_available

            pipeline = DiffusionPipeline.from_pretrained(
                path,
                dtype=dtypes,
                low_cpu_mem_usage=is_accelerate_available(),
                use_safetensors=True,  # the other format is pickled
                **_folder_options(Path(path)),
            )
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"no diffusers pipeline at {path}: {reason[:200]}") from None
    parts = dict(pipeline.components)
    parts["zero_empty_text"] = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
    return parts


def _folder_options(path: Path) -> dict[str, Any]:
    """What has to be said of a folder: published ones carry parts we do not use, or half-precision files."""
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a hub id, or no pipeline: from_pretrained will say so
    options: dict[str, Any] = {}
    if (index.get("safety_checker") or [None])[0] is not None:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    weights = [file.name for file in (path / "unet").glob("*.safetensors")]
    if weights and all(".fp16" in name for name in weights):
        options["variant"] = "fp16"
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import diffusers.utils.logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    try:
        with quiet_loading():
            yield
    finally:
        diffusers_logging.enable_progress_bar()
