"""A person's taste as one small file: what it holds, how it is checked, written and read.

The file is safetensors with a json header under the metadata key ``profile``; nothing in it can run code.
:mod:`prefgen.taste` builds it from images, :mod:`prefgen.pipeline` draws with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from prefgen.errors import CheckpointError
from prefgen.models.artefact_file import SEAL, is_whole, sealed
from prefgen.whole_file import whole_file

PROFILE_VERSION = 2
"""Version of the file that is written. Version 1, which did not count updates, is read too."""

TENSORS = (
    "core_embeds",
    "sem_embeds",
    "image_embeds",
    "core_negative",
    "sem_negative",
    "image_negative",
    "image_mean",
    "image_mean_negative",
)
"""Names of the tensors in the file, each one-dimensional float32."""

PROFILE_PARTS = ("mllm", "lora", "probe", "image_encoder")
"""Parts of a lineage that a profile depends on; an adapter trained on other ones cannot read it."""

_HEADER_KEY = "profile"
_SINCE_VERSION_2 = {"updates", "combined"}
_LARGEST_FILE = 16 << 20
_LARGEST_HEADER = 1 << 20
_WIDEST = 1 << 20
_LONGEST_TEXT = 10_000


@dataclass(frozen=True, kw_only=True)
class ProfileCounts:
    """From how much a profile was made: what an update needs to weigh new images against old ones.

    Attributes:
        liked: liked images seen.
        disliked: disliked images seen.
        draws: draws of references whose mean ``core_embeds`` and ``sem_embeds`` are.
        updates: how often images were added since it was built. ``core_embeds`` and ``sem_embeds`` are then
            only near those of a build from all images; the image means are the same.
        combined: how many profiles were combined into this one; 0 for one that was built.
    """

    liked: int
    disliked: int
    draws: int
    updates: int = 0
    combined: int = 0


@dataclass(frozen=True, kw_only=True)
class UserProfile:
    """One user's taste. All tensors are one-dimensional, float32, on the CPU.

    Attributes:
        core_embeds: (Dcore,) identity part, mean over draws.
        sem_embeds: (Dsem,) likes and dislikes, mean over draws; stage align maps it into the text space.
        image_embeds: (Dimage,) embedding of ONE liked image, the one nearest to the mean of all.
        core_negative: (Dcore,) the same history with its sides swapped.
        sem_negative: (Dsem,) likewise.
        image_negative: (Dimage,) one disliked image; zeros where there is none, which drops the part.
        image_mean: (Dimage,) mean over all liked images.
        image_mean_negative: (Dimage,) mean over all disliked images; zeros where there is none.
        counts: from how much it was made.
        lineage: ``PROFILE_PARTS`` -> hash of the model that made it.
        user_id: only if asked.
        likes: what the MLLM says this user likes, only if asked.
        dislikes: likewise.
    """

    core_embeds: Tensor
    sem_embeds: Tensor
    image_embeds: Tensor
    core_negative: Tensor
    sem_negative: Tensor
    image_negative: Tensor
    image_mean: Tensor
    image_mean_negative: Tensor
    counts: ProfileCounts
    lineage: Mapping[str, str] = field(default_factory=dict)
    user_id: str | None = None
    likes: str | None = None
    dislikes: str | None = None

    def __post_init__(self) -> None:
        """Refuse anything that could not have come from ``build``.

        Raises:
            CheckpointError: a tensor is missing a dimension, has the wrong width, or holds NaN or infinity.
        """
        for name in TENSORS:
            _check_tensor(getattr(self, name), name=name)
        for name, twin in (
            ("core_embeds", "core_negative"),
            ("sem_embeds", "sem_negative"),
            ("image_embeds", "image_negative"),
            ("image_embeds", "image_mean"),
            ("image_embeds", "image_mean_negative"),
        ):
            widths = len(getattr(self, name)), len(getattr(self, twin))
            if widths[0] != widths[1]:
                raise CheckpointError(f"profile: {twin} has {widths[1]} numbers, {name} has {widths[0]}")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in TENSORS}

    def side(self, name: Literal["liked", "disliked"]) -> tuple[Tensor, Tensor, Tensor]:
        """(sem, core, image) of what the user likes, or of the negative twins."""
        if name == "liked":
            return self.sem_embeds, self.core_embeds, self.image_embeds
        return self.sem_negative, self.core_negative, self.image_negative

    def require_lineage(
        self,
        expected: Mapping[str, str],
        *,
        what: str,
        mend: str = "build the profile again with 'prefgen profile build'",
    ) -> None:
        """Refuse to go on with models other than those that made the profile.

        Args:
            expected: part -> hash; parts either side does not know are not compared.
            what: who asks, for the message, e.g. ``"the adapter user_adapter.safetensors"``.
            mend: what the user can do about it.

        Raises:
            CheckpointError: naming the first part that differs.
        """
        for part in PROFILE_PARTS:
            ours, theirs = self.lineage.get(part), expected.get(part)
            if ours is not None and theirs is not None and ours != theirs:
                raise CheckpointError(
                    f"this profile was made by another {part} ({ours[:12]}) than that of {what} "
                    f"({theirs[:12]}); {mend}"
                )

    def without_words(self) -> UserProfile:
        """The same taste without anything a person could read."""
        return replace(self, user_id=None, likes=None, dislikes=None)

    def save(self, path: Path) -> None:
        """Write the file in one piece.

        Raises:
            CheckpointError: the file cannot be written.
        """
        header = {
            "version": PROFILE_VERSION,
            "counts": {item.name: getattr(self.counts, item.name) for item in fields(ProfileCounts)},
            "lineage": dict(self.lineage),
            "user_id": self.user_id,
            "likes": self.likes,
            "dislikes": self.dislikes,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        data = to_bytes(tensors, metadata={_HEADER_KEY: sealed(header, tensors=tensors)})
        try:
            with whole_file(path, shared=True) as part:
                part.write_bytes(data)
        except OSError as error:
            raise CheckpointError(f"cannot write profile {path}: {error.strerror}") from None

    @staticmethod
    def load(path: Path) -> UserProfile:
        """Read and check a file.

        Raises:
            CheckpointError: no file, no profile, another version, torn, damaged, oversized, or not finite.
        """
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"cannot read profile {path}: {error.strerror}") from None
        if size > _LARGEST_FILE:
            raise CheckpointError(f"{path} has {size} bytes; a profile has at most {_LARGEST_FILE}")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_HEADER_KEY)
                if text is None:
                    raise CheckpointError(f"{path} is no prefgen profile: it has no profile header")
                names = set(file.keys())
                if names != set(TENSORS):
                    wrong = sorted(names ^ set(TENSORS))[0]
                    raise CheckpointError(f"{path}: tensor {wrong!r} is missing or not part of a profile")
                tensors = {name: file.get_tensor(name) for name in TENSORS}
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} is no prefgen profile or torn: {reason}") from None
        try:
            profile = UserProfile(**tensors, **_read_header(text))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not is_whole(_json_object(text), tensors=tensors):
            raise CheckpointError(
                f"{path} is damaged: its {SEAL} does not fit its content; copy it again, or build it again "
                "with 'prefgen profile build'"
            )
        return profile


def _check_tensor(tensor: Tensor, *, name: str) -> None:
    if tensor.ndim != 1 or not 0 < len(tensor) <= _WIDEST:
        raise CheckpointError(f"profile: {name} must be one row of numbers, got shape {tuple(tensor.shape)}")
    if tensor.dtype != torch.float32:
        raise CheckpointError(f"profile: {name} must be float32, got {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"profile: {name} holds NaN or infinity")


def _read_header(text: str) -> dict[str, Any]:
    header = _json_object(text)
    version = header.get("version")
    # True == 1 in Python, and json has a true.
    if isinstance(version, bool) or version not in (1, PROFILE_VERSION):
        raise CheckpointError(
            f"profile version {version!r}; this prefgen reads versions 1 and {PROFILE_VERSION}"
        )
    counts, lineage = header.get("counts"), header.get("lineage")
    names = {item.name for item in fields(ProfileCounts)} - (_SINCE_VERSION_2 if version == 1 else set())
    if not isinstance(counts, dict) or set(counts) != names or not all(map(_is_count, counts.values())):
        raise CheckpointError(
            f"profile counts must be {', '.join(sorted(names))} as whole numbers, got {counts!r}"
        )
    if not isinstance(lineage, dict) or not all(isinstance(v, str) for v in lineage.values()):
        raise CheckpointError("profile lineage must map names to hashes")
    words: dict[str, str | None] = {}
    for name in ("user_id", "likes", "dislikes"):
        word = header.get(name)
        if word is not None and (not isinstance(word, str) or len(word) > _LONGEST_TEXT):
            raise CheckpointError(
                f"profile {name} must be text of at most {_LONGEST_TEXT} characters or null"
            )
        words[name] = word
    return {"counts": ProfileCounts(**counts), "lineage": lineage, **words}


def _json_object(text: str) -> dict[str, Any]:
    if len(text) > _LARGEST_HEADER:
        raise CheckpointError(f"profile header of {len(text)} characters; at most {_LARGEST_HEADER}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError("profile header is not a json object")
    return cast(dict[str, Any], header)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
