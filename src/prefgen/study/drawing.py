"""The conditions of an evaluation: for whom and with what the same prompts are drawn from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefgen.data.embeddings import check_lineage
from prefgen.data.sampling import rng_for
from prefgen.errors import CheckpointError
from prefgen.evaluate.alignment import derangement
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import PartName
from prefgen.models.pixels import from_uint8, to_uint8
from prefgen.models.projector import SemProjector, load_projector
from prefgen.models.sampling import SampleUsers, sample
from prefgen.models.user_adapter import UserAdapter, load_user_adapter
from prefgen.study.kept_drawings import KeptDrawings
from prefgen.study.users import StudyUser

MEANINGS = {
    "base": "the base model with the prompt alone",
    "own": "with the user's own profile",
    "other": "with the profile of another test user, drawn by lot",
    "image_only": "a separate adapter trained alike on one liked image only",
    "words": "the base model with the true liked attributes in the prompt: an upper line, not a rival",
    "real": "real drawings the user liked and the profile was not made from: the ceiling",
}
"""Condition -> what it is, in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How pictures are drawn, the same under every condition."""

    num_steps: int
    guidance_scale: float
    user_scale: float
    batch_size: int


class Studio:
    """The frozen pipeline with one user adapter at a time.

    Attributes:
        bundle: the pipeline; its UNet may be in bfloat16, the rest is float32.
        projector: stage align's.
        header: lineage of the embeddings.
        kept: pictures of the base model from earlier evaluations.
    """

    def __init__(
        self,
        *,
        pipeline: str,
        projector: Path,
        header: Mapping[str, Any],
        unet_dtype: torch.dtype,
        memory_format: Any,
        image_encoder: str | None = None,
        device: str = "cpu",
        kept: KeptDrawings | None = None,
    ) -> None:
        self.bundle = DiffusionBundle.load(
            pipeline, memory_format=memory_format, image_encoder=image_encoder, device=device
        )
        # Not unet.to(): diffusers warns of modules to be kept in float32 there, though it lists none.
        torch.nn.Module.to(self.bundle.unet, unet_dtype)
        self.header, self.kept = header, kept
        self.projector: SemProjector = load_projector(projector).projector.to(device)
        self._projector_hash = hash_file(projector)
        unet = Path(pipeline) / "unet"
        self._unet_hash = hash_folder(unet) if unet.is_dir() else None

    def load_adapter(self, path: Path) -> UserAdapter:
        """Read a user adapter and check that it belongs to pipeline, projector and embeddings.

        Raises:
            CheckpointError: it does not.
        """
        loaded = load_user_adapter(path, unet=self.bundle.unet)
        lineage = loaded.lineage
        if self._unet_hash and lineage.get("unet", self._unet_hash) != self._unet_hash:
            raise CheckpointError(f"{path} was trained with another UNet; run 'prefgen fit --stage inject'")
        if lineage.get("projector", self._projector_hash) != self._projector_hash:
            raise CheckpointError(
                f"{path} was trained with another projector; run 'prefgen fit --stage inject' again"
            )
        shared = {name: value for name, value in lineage.items() if name in self.header}
        check_lineage(
            self.header,
            expected=shared,
            where=f"the embeddings beside {path}",
            mend="run 'prefgen fit --stage inject' again on these embeddings",
        )
        return loaded.adapter.to(self.bundle.device)

    @torch.no_grad()
    def parts(self, users: Sequence[StudyUser], *, adapter: UserAdapter) -> dict[PartName, Tensor]:
        """What an adapter reads of some users, a row each: means over the profile's draws, and e_img."""

        def rows(name: str) -> Tensor:
            found = [getattr(user.embeddings, name)[list(user.draws)].mean(axis=0) for user in users]
            return torch.stack([torch.from_numpy(row) for row in found]).to(self.bundle.device)

        wanted = adapter.fusion.shape.parts
        parts: dict[PartName, Tensor] = {}
        if "aligned" in wanted:
            parts["aligned"] = self.projector(rows("sem"))
        if "core" in wanted:
            parts["core"] = rows("core")
        if "image" in wanted:
            anchors = [torch.from_numpy(user.embeddings.image[user.anchor]) for user in users]
            parts["image"] = torch.stack(anchors)
        return parts

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        settings: DrawSettings,
        adapter: UserAdapter | None = None,
        parts: Mapping[PartName, Tensor] | None = None,
        progress: Callable[[int], object],
    ) -> Tensor:
        """(B,3,H,W) in [-1,1], rounded to 8 bits: what the judge sees is what a user would see.

        Args:
            prompts: B prompts.
            seeds: B seeds of the noise.
            settings: steps, guidance, scale, batch size.
            adapter: None draws with the base model.
            parts: (B,D) of each part the adapter reads.
            progress: called with the number of pictures just drawn.
        """
        users = None
        if adapter is not None and parts is not None:
            users = SampleUsers.of(adapter, parts=parts, scale=settings.user_scale)
        draw = partial(self.draw_for, prompts, seeds=seeds, settings=settings, users=users, progress=progress)
        if users is not None or self.kept is None:
            return draw()
        asked = {
            "prompts": list(prompts),
            "seeds": [int(seed) for seed in seeds],
            "num_steps": settings.num_steps,
            "guidance_scale": settings.guidance_scale,
            "batch_size": settings.batch_size,  # products of another one round differently
        }
        return self.kept.find_or_draw(draw, asked=asked, progress=progress)

    @torch.no_grad()
    def draw_for(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        settings: DrawSettings,
        users: SampleUsers | None,
        progress: Callable[[int], object],
    ) -> Tensor:
        """:meth:`draw` for users whose tokens and scales are known; None draws with the base model."""
        if users is not None:
            users.attention.install()
        drawn = []
        try:
            for start in range(0, len(prompts), settings.batch_size):
                rows = slice(start, start + settings.batch_size)
                pixels = sample(
                    self.bundle,
                    prompts[rows],
                    seeds=seeds[rows],
                    users=None if users is None else users.part(rows),
                    num_steps=settings.num_steps,
                    guidance_scale=settings.guidance_scale,
                )
                drawn.append(rounded(pixels))
                progress(len(pixels))
        finally:
            if users is not None:
                users.attention.remove()
        return torch.cat(drawn)

    @torch.no_grad()
    def restored(self, pixels: Tensor, *, batch_size: int, progress: Callable[[int], object]) -> Tensor:
        """The VAE's round trip of drawings (B,3,H,W), rounded to 8 bits: the best any UNet could draw."""
        scaling = self.bundle.vae.config.scaling_factor
        parts = []
        for start in range(0, len(pixels), batch_size):
            mean = self.bundle.encode_moments(pixels[start : start + batch_size]).mean
            parts.append(rounded(self.bundle.decode_latents(mean * scaling)))
            progress(len(parts[-1]))
        return torch.cat(parts)


def rounded(pixels: Tensor) -> Tensor:
    """Pixels as they are after saving and reading an 8-bit picture."""
    return from_uint8(to_uint8(pixels))


def draw_all(
    studio: Studio,
    users: Sequence[StudyUser],
    *,
    adapters: Mapping[str, UserAdapter],
    groups: Mapping[str, Sequence[str]],
    settings: DrawSettings,
    seed: int,
    progress: Callable[[int], object],
) -> dict[str, Tensor]:
    """Condition -> (U,P,3,H,W) pixels, in the order of ``MEANINGS``.

    Args:
        studio: pipeline and projector.
        users: U users with P prompts each.
        adapters: ``own`` and, unless it is left out, ``image_only``.
        groups: attribute words by group, for the prompts of ``words``.
        settings: the same for all.
        seed: of the derangement and of the words' order.
        progress: called with the number of pictures just drawn.
    """
    num_prompts = len(users[0].prompts)
    prompts = [prompt for user in users for prompt in user.prompts]
    seeds = [one for user in users for one in user.seeds]

    def draw(
        texts: Sequence[str], whom: Sequence[StudyUser] = (), adapter: UserAdapter | None = None
    ) -> Tensor:
        parts = None
        if adapter is not None:
            found = studio.parts(whom, adapter=adapter)
            parts = {name: rows.repeat_interleave(num_prompts, dim=0) for name, rows in found.items()}
        pixels = studio.draw(
            texts, seeds=seeds, settings=settings, adapter=adapter, parts=parts, progress=progress
        )
        return pixels.reshape(len(users), num_prompts, *pixels.shape[1:])

    others = [users[i] for i in derangement(len(users), seed=seed)]
    drawn = {"base": draw(prompts), "own": draw(prompts, users, adapters["own"])}
    drawn["other"] = draw(prompts, others, adapters["own"])
    if "image_only" in adapters:
        drawn["image_only"] = draw(prompts, users, adapters["image_only"])
    if all(user.history.liked_attributes for user in users):
        texts = [_worded(user, i, groups=groups, studio=studio, seed=seed) for user, i in _each(users)]
        drawn["words"] = draw(texts)
    drawn["real"] = torch.stack([user.liked[list(user.real)] for user in users])
    return drawn


def _each(users: Sequence[StudyUser]) -> list[tuple[StudyUser, int]]:
    return [(user, i) for user in users for i in range(len(user.prompts))]


def _worded(
    user: StudyUser, number: int, *, groups: Mapping[str, Sequence[str]], studio: Studio, seed: int
) -> str:
    """Prompt and true liked attributes, one of each group at most: a picture shows one value of a group."""
    rng = rng_for(seed=seed, epoch=number, key=user.user_id, purpose="evaluate words")
    group_of = {word: group for group, words in groups.items() for word in words}
    liked = [
        user.history.liked_attributes[int(i)] for i in rng.permutation(len(user.history.liked_attributes))
    ]
    chosen = list({group_of.get(word, word): word for word in liked}.values())
    return fitted_prompt(user.prompts[number], words=chosen, bundle=studio.bundle)


def fitted_prompt(prompt: str, *, words: Sequence[str], bundle: DiffusionBundle) -> str:
    """The prompt and as many of the words, from the first on, as its text encoder takes."""
    for count in range(len(words), 0, -1):
        text = ", ".join([prompt, *words[:count]])
        ids = bundle.tokenizer(text)["input_ids"]
        if len(ids) <= int(bundle.tokenizer.model_max_length):
            return text
    return prompt
