"""Embedding shards: what stage probe writes about each user and stages align and inject read.

One sample is one user: ``KEY.user.json`` beside float32 ``.npy`` members. The index's header says which
models made the numbers; a later stage compares it with its own and refuses a mismatch in words.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefgen.data.index import ShardIndex, open_root, parse_json, read_index
from prefgen.data.parts import Part
from prefgen.data.reader import MAX_JSON_BYTES, OnBad, SkipCounter
from prefgen.data.remote import RemoteFolder
from prefgen.data.tarstore import ShardFiles, ShardFolder, split_members
from prefgen.errors import CheckpointError, DataError
from prefgen.schema import Split

Array = NDArray[np.float32]

ARRAYS = ("core", "sem", "core_negative", "sem_negative", "image")
DRAW_ARRAYS = ARRAYS[:4]
JSON_MEMBER = "user.json"
MAX_ARRAY_BYTES = 1 << 30
USERS_PER_SHARD = 256


@dataclass(frozen=True, kw_only=True)
class UserEmbeddings:
    """Everything known in numbers about one user: R reference draws and N images.

    Attributes:
        user_id: the user.
        key: sample key; filled in by the reader.
        core: (R, Dcore) identity part of each draw.
        sem: (R, Dsem) taste part of each draw.
        core_negative: (R, Dcore) the same references with the sides swapped.
        sem_negative: (R, Dsem) the same.
        reference_keys: image keys of each draw, R tuples; a target must not be among them.
        image: (N, Dimage) image-encoder embeddings: of the liked images, then of the disliked ones, which
            stage probe leaves out for training users.
        image_keys: image key of each row of ``image``, N.
        prompts: prompt of each image, N; empty text where unknown.
        liked_attributes: attributes the user is drawn to; may be empty.
        disliked_attributes: attributes the user avoids; may be empty.
    """

    user_id: str
    core: Array
    sem: Array
    core_negative: Array
    sem_negative: Array
    reference_keys: tuple[tuple[str, ...], ...]
    image: Array
    image_keys: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    liked_attributes: tuple[str, ...] = ()
    disliked_attributes: tuple[str, ...] = ()
    key: str = ""

    def rows_outside(self, draw: int, *, side: str = "liked") -> tuple[int, ...]:
        """Rows of ``image`` of one side outside a draw's references: possible targets and anchors."""
        used = set(self.reference_keys[draw])
        return tuple(row for row, key in enumerate(self.image_keys) if key not in used and f"/{side}." in key)


class EmbeddingWriter:
    """Writes embedding shards; a context manager that leaves no half set behind.

    ::

        with EmbeddingWriter(out, header=header) as writer:
            writer.add(embeddings, split="train")
            index = writer.close()
    """

    def __init__(
        self,
        out: Path | str,
        *,
        header: dict[str, Any],
        users_per_shard: int = USERS_PER_SHARD,
        overwrite: bool = False,
        part: Part | None = None,
        first_shards: Mapping[Split, int] | None = None,
    ) -> None:
        """Prepare ``out``.

        Args:
            out: folder for the shards and ``index.json``.
            header: plain json: which MLLM, lora, layers, poolings and image encoder (hashes).
            users_per_shard: users in one tar file.
            overwrite: replace an earlier set.
            part: write a part of the set; see :class:`prefgen.data.tarstore.ShardFolder`.
            first_shards: number of the part's first tar file of each split.

        Raises:
            DataError: the folder is occupied, or the header is not plain json.
        """
        try:
            self._header = json.loads(json.dumps(header, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"embedding header must be plain json ({error})") from None
        self._folder = ShardFolder(
            out,
            kind="embeddings",
            samples_per_shard=users_per_shard,
            overwrite=overwrite,
            part=part,
            first_shards=first_shards,
            plan=json.dumps(self._header, sort_keys=True),
        )
        self._shapes: dict[str, int] = {}

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.__exit__(*exc)

    def add(self, embeddings: UserEmbeddings, *, split: Split) -> None:
        """Append one user.

        Raises:
            DataError: shapes or counts that do not fit together, non-finite numbers, or a user seen before.
        """
        check_embeddings(embeddings, where=f"user {embeddings.user_id}")
        for name in ARRAYS:
            width = getattr(embeddings, name).shape[1]
            if self._shapes.setdefault(name, width) != width:
                raise DataError(
                    f"user {embeddings.user_id}: {name} is {width} wide, earlier users {self._shapes[name]}"
                )
        record = {
            field.name: getattr(embeddings, field.name)
            for field in fields(embeddings)
            if field.name not in (*ARRAYS, "key")
        }
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        members = {JSON_MEMBER: text.encode("utf-8")}
        members |= {f"{name}.npy": to_npy(getattr(embeddings, name)) for name in ARRAYS}
        self._folder.add_user(embeddings.user_id, split=split, parts=[(members, 0, 0)])

    def close(self) -> ShardIndex:
        """Finish and write ``index.json``; without this call there is no set."""
        return self._folder.close(header=self._header)


class EmbeddingReader:
    """The embeddings of one split: ``len(reader)``, ``reader[i]``. Safe to fork and to pickle.

    Attributes:
        header: which models made the set.
        user_ids: by position.
        shard_sizes: users in each shard, in order.
    """

    def __init__(self, root: Path | str | RemoteFolder, *, split: Split, on_bad: OnBad = "raise") -> None:
        """Open; arguments and errors as for :class:`prefgen.data.reader.ShardReader`."""
        self.root = open_root(root)
        self.split = split
        self.index = read_index(self.root, kind="embeddings")
        shards = self.index.shards(split, where=self.root)
        self._entries = [(shard, entry) for shard in shards for entry in shard.samples]
        self.header: Mapping[str, Any] = self.index.header
        self.user_ids = tuple(entry.user_id for _, entry in self._entries)
        self.shard_sizes = tuple(len(shard.samples) for shard in shards)
        self._on_bad = on_bad
        self._files = ShardFiles(self.root)
        self._skips = SkipCounter()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def skipped(self) -> int:
        """Bad users met so far in this process."""
        return self._skips.count

    def __getitem__(self, position: int) -> UserEmbeddings | None:
        """The user at a position, or ``None`` where it is bad and ``on_bad="skip"``."""
        try:
            return self.read(position)
        except DataError as error:
            if self._on_bad == "raise":
                raise
            self._skips.add(error)
            return None

    def read(self, position: int) -> UserEmbeddings:
        """The user at a position; a bad sample always raises DataError."""
        shard, entry = self._entries[position]
        where = f"{self.root / shard.name}: sample {entry.key}"
        data = self._files.read(shard, sample=entry)
        members = split_members(data, key=entry.key, where=where, max_member_bytes=MAX_ARRAY_BYTES)
        names = {JSON_MEMBER, *(f"{name}.npy" for name in ARRAYS)}
        if members.keys() != names:
            wrong = min(members.keys() ^ names)
            word = "missing" if wrong in names else "not expected"
            raise DataError(f"{where}: member {wrong!r} is {word}")
        record = parse_json(members[JSON_MEMBER], where=f"{where}: {JSON_MEMBER}", max_bytes=MAX_JSON_BYTES)
        arrays = {name: from_npy(members[f"{name}.npy"], where=f"{where}: {name}.npy") for name in ARRAYS}
        try:
            found = UserEmbeddings(
                user_id=str(record["user_id"]),
                key=entry.key,
                reference_keys=tuple(_texts(draw) for draw in record["reference_keys"]),
                image_keys=_texts(record["image_keys"]),
                prompts=_texts(record["prompts"]),
                liked_attributes=_texts(record["liked_attributes"]),
                disliked_attributes=_texts(record["disliked_attributes"]),
                **arrays,
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: {JSON_MEMBER} lacks or misuses {error}") from None
        if found.user_id != entry.user_id:
            raise DataError(f"{where}: belongs to {found.user_id!r}, but the index says {entry.user_id!r}")
        check_embeddings(found, where=where)
        return found


def check_embeddings(embeddings: UserEmbeddings, *, where: str) -> None:
    """Shapes and counts that fit together, and finite numbers.

    Raises:
        DataError: naming the array and what was expected.
    """
    draws, images = len(embeddings.reference_keys), len(embeddings.image_keys)
    for name in ARRAYS:
        array = getattr(embeddings, name)
        rows = draws if name in DRAW_ARRAYS else images
        if array.dtype != np.float32 or array.ndim != 2 or array.shape[0] != rows:
            raise DataError(
                f"{where}: {name} must be float32 of shape ({rows}, D), got {array.dtype} {array.shape}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{where}: {name} holds NaN or infinite numbers")
    for name in ("core", "sem"):
        if getattr(embeddings, name).shape != getattr(embeddings, f"{name}_negative").shape:
            raise DataError(f"{where}: {name} and {name}_negative differ in shape")
    if len(embeddings.prompts) not in (0, images):
        raise DataError(f"{where}: {len(embeddings.prompts)} prompts for {images} images")


def check_lineage(
    header: Mapping[str, Any],
    *,
    expected: Mapping[str, Any],
    where: object,
    mend: str = "run the earlier stage again",
) -> None:
    """Refuse embeddings that other models have made.

    Args:
        header: of the embedding set (``EmbeddingReader.header``).
        expected: the entries this stage relies on, such as ``{"lora": "sha256:.."}``; no others are compared.
        where: the set, for the message.
        mend: what the user can do about it, such as a command.

    Raises:
        CheckpointError: an entry is missing or differs; names all of them.
    """
    wrong = [
        f"{key} is {header.get(key, 'not recorded')!r} but {value!r} is expected"
        for key, value in sorted(expected.items())
        if header.get(key) != value
    ]
    if wrong:
        raise CheckpointError(f"{where}: made by other models: {'; '.join(wrong)}; {mend}")


def to_npy(array: NDArray[Any], *, dtype: type[np.floating[Any]] = np.float32) -> bytes:
    """The bytes of a ``.npy`` file of floating numbers, in C order, without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=dtype), allow_pickle=False)
    return buffer.getvalue()


def from_npy(
    data: bytes, *, where: str, dtypes: tuple[type[np.floating[Any]], ...] = (np.float32,)
) -> NDArray[Any]:
    """Read ``.npy`` bytes.

    Args:
        data: the file.
        where: for messages.
        dtypes: number formats that are accepted.

    Raises:
        DataError: pickled objects, another format, a header that promises more than there is, or damage.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=4096)
    except (
        Exception
    ) as error:  # numpy hands a hostile header to Python's tokenizer, which raises what it likes
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{where}: not a plain npy array ({reason})") from None
    if dtype not in dtypes or fortran:
        names = " or ".join(np.dtype(one).name for one in dtypes)
        raise DataError(f"{where}: expected {names} in C order, got {dtype}")
    start = file.tell()
    # The size is checked before anything is allocated: a header may promise terabytes.
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise DataError(f"{where}: its header promises shape {shape}, but {len(data) - start} bytes follow")
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).copy()


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("a list of text")
    return tuple(value)
