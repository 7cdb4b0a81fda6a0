"""Which model made a file: content hashes that travel in headers. Standard library only.

Later stages refuse embeddings, adapters and profiles whose hashes differ from their own inputs': vectors of
another MLLM have the right shape and no meaning.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from prefgen.errors import DataError

LINEAGE_PARTS = ("mllm", "lora", "probe", "image_encoder", "text_encoder")
"""Names under which hashes travel in headers."""

_CHUNK = 1 << 22


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def hash_folder(path: Path) -> str:
    """SHA-256 over names and bytes of a model folder's weights and tokenizer, as hex.

    Configuration files are left out: libraries write their own version and the folder's path into them, so
    one model saved twice would count as two.

    Raises:
        DataError: there are no safetensors weights in the folder.
    """
    files = sorted([*path.glob("*.safetensors"), *path.glob("tokenizer.json")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise DataError(f"no safetensors weights in {path}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def hash_json(value: object) -> str:
    """SHA-256 of a json value, whatever the order of its keys, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
