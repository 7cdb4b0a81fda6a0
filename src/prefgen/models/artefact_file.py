"""One way to write and read an artefact: a safetensors file with a versioned json header."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from prefgen.errors import CheckpointError
from prefgen.whole_file import whole_file


@dataclass(frozen=True, kw_only=True)
class ArtefactKind:
    """What a kind of artefact is called.

    Attributes:
        name: in messages.
        key: of the header in the file's metadata.
        version: of the format; a reader refuses any other.
        stage: whose fit writes it.
    """

    name: str
    key: str
    version: int
    stage: str

    def write(self, path: Path, *, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Write tensors and header in one piece."""
        text = json.dumps({**header, "version": self.version}, sort_keys=True)
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with whole_file(path) as part:
            # save_file would make a file that only its owner can read, and so a shared artefact of no use.
            part.write_bytes(to_bytes(plain, metadata={self.key: text}))

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors.

        Raises:
            CheckpointError: absent, torn, of another kind or version.
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
