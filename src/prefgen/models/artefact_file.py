"""One way to write and read an artefact: a safetensors file with a versioned json header and a seal.

safetensors notices that a file was cut short, not that a bit of it has turned: the seal, a SHA-256 over
header and tensors, stands in the header. Files from before there was one are read without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from prefgen.errors import CheckpointError
from prefgen.whole_file import whole_file

SEAL = "sha256"
"""Name of the seal in a header."""


def sealed(header: Mapping[str, Any], *, tensors: Mapping[str, Tensor]) -> str:
    """The header as json text, with its seal."""
    plain = json.loads(json.dumps(header))
    return json.dumps({**plain, SEAL: _seal(plain, tensors=tensors)}, sort_keys=True)


def is_whole(header: Mapping[str, Any], *, tensors: Mapping[str, Tensor]) -> bool:
    """Whether header and tensors are those that were sealed; True for an older file, which has no seal."""
    return SEAL not in header or header[SEAL] == _seal(header, tensors=tensors)


def _seal(header: Mapping[str, Any], *, tensors: Mapping[str, Tensor]) -> str:
    plain = {name: value for name, value in header.items() if name != SEAL}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ArtefactKind:
    """What a kind of artefact is called.

    Attributes:
        name: in messages.
        key: of the header in the file's metadata.
        version: of the format; a reader refuses any other.
        stage: whose fit writes it.
        shared: several processes may write one file at once.
    """

    name: str
    key: str
    version: int
    stage: str
    shared: bool = False

    def write(self, path: Path, *, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Write tensors and header in one piece."""
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        text = sealed({**header, "version": self.version}, tensors=plain)
        with whole_file(path, shared=self.shared) as part:
            # save_file would make a file that only its owner can read, and so a shared artefact of no use.
            part.write_bytes(to_bytes(plain, metadata={self.key: text}))

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors.

        Raises:
            CheckpointError: absent, torn, damaged, of another kind or version.
        """
        if not path.is_file():
            raise CheckpointError(f"no {self.name} at {path}; run 'prefgen fit --stage {self.stage}' first")
        with self.fitting(path), safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(self.key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if not isinstance(header, dict) or header.get("version") != self.version:
            raise CheckpointError(
                f"{path} is no {self.name} of version {self.version}; "
                f"run 'prefgen fit --stage {self.stage}' again"
            )
        if not is_whole(header, tensors=tensors):
            raise CheckpointError(
                f"{path} is damaged: its {SEAL} does not fit its content; copy it again, or run "
                f"'prefgen fit --stage {self.stage}' again"
            )
        header.pop(SEAL, None)
        return header, tensors

    @contextlib.contextmanager
    def fitting(self, path: Path) -> Iterator[None]:
        """Whatever goes wrong inside while the file's content is put to use, in one line.

        Raises:
            CheckpointError: the content is not what its header says.
        """
        try:
            yield
        except (
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} is no {self.name} or torn: {reason}") from None
