"""Textual inversion of each user (arXiv 2208.01618): token embeddings of their own, learned at test time.

The only condition that optimises anything per user: it shows what that buys and what it costs. Users are
learned side by side in one batch; Adam works number by number, so each user's embeddings come out as if they
were learned alone, with one picture a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prefgen.data.sampling import rng_for
from prefgen.errors import ConfigError, DataError
from prefgen.models.diffusion import DiffusionBundle, TextCondition
from prefgen.models.noise import draw_noise, noise_loss
from prefgen.models.sampling import sample
from prefgen.study.drawing import DrawSettings, Studio, rounded
from prefgen.study.users import StudyUser


class TasteEmbedding(nn.Module):
    """A token embedding that knows more tokens: theirs are looked up in ``vectors``, row by row.

    Attributes:
        vectors: (B,V,D) of the B texts encoded next.
    """

    def __init__(self, base: nn.Embedding, *, first_id: int) -> None:
        super().__init__()
        self.base, self.first_id = base, first_id
        self.vectors: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """(B,T,D) embeddings of ids (B,T); ids from ``first_id`` on are the learned ones."""
        rows: Tensor = self.base(ids.clamp(max=self.first_id - 1))
        learned = ids >= self.first_id
        if self.vectors is None or not bool(learned.any()):
            return rows
        slots = (ids - self.first_id).clamp(min=0)
        own = self.vectors.gather(1, slots[..., None].expand(-1, -1, rows.shape[-1]))
        return torch.where(learned[..., None], own.to(rows.dtype), rows)


@dataclass(frozen=True, kw_only=True)
class InvertedText:
    """A bundle whose text encoder knows V more words.

    Attributes:
        bundle: the pipeline with encoder and tokenizer of its own.
        embedding: where the vectors are put.
        words: the new words, as they stand in a prompt.
    """

    bundle: DiffusionBundle
    embedding: TasteEmbedding
    words: str

    @staticmethod
    def of(bundle: DiffusionBundle, *, num_vectors: int) -> InvertedText:
        """A copy of the text side; the bundle itself is left as it was.

        Raises:
            ConfigError: the pipeline has two text encoders.
        """
        if bundle.text_encoder_2 is not None:
            raise ConfigError("inversion works with one text encoder; leave it out of extra.conditions")
        tokenizer = copy.deepcopy(bundle.tokenizer)
        first_id = len(tokenizer)
        names = [f"<taste{i}>" for i in range(num_vectors)]
        tokenizer.add_tokens(names)
        encoder = copy.deepcopy(bundle.text_encoder)
        name = next(n for n, _ in encoder.named_modules() if n.endswith("token_embedding"))
        parent = encoder.get_submodule(name.rpartition(".")[0])
        embedding = TasteEmbedding(parent.token_embedding, first_id=first_id)
        parent.token_embedding = embedding
        encoder.requires_grad_(False)
        return InvertedText(
            bundle=replace(bundle, text_encoder=encoder, tokenizer=tokenizer),
            embedding=embedding,
            words=" ".join(names),
        )

    def start(self, count: int) -> Tensor:
        """(count,V,D) float32: the mean embedding of the vocabulary, where every user begins (our choice)."""
        mean = self.embedding.base.weight.float().mean(dim=0)
        return mean.expand(count, len(self.words.split()), -1).clone()

    def prompt(self, prompt: str) -> str:
        """The prompt with the new words behind it."""
        return ", ".join(part for part in (prompt, self.words) if part)

    def encode(self, prompts: Sequence[str], *, vectors: Tensor) -> TextCondition:
        """The prompts (B) with the new words, each by its own vectors (B,V,D); gradients reach those.

        Raises:
            DataError: a prompt with the new words is too long for the encoder.
        """
        tokenizer: Any = self.bundle.tokenizer
        limit = int(tokenizer.model_max_length)
        texts = [self.prompt(prompt) for prompt in prompts]
        ids = tokenizer(texts, padding="max_length", max_length=limit)["input_ids"]
        for text, row in zip(texts, ids, strict=True):
            if len(row) > limit:
                raise DataError(f"prompt of {len(row)} tokens for a text encoder of {limit}: {text[:60]!r}")
        self.embedding.vectors = vectors
        out = self.bundle.text_encoder(torch.tensor(ids, device=self.bundle.device))
        return TextCondition(hidden=out.last_hidden_state, pooled=out.pooler_output)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned.

    Attributes:
        vectors: (U,V,D).
        curve: mean noise loss over users, step by step.
    """

    vectors: Tensor
    curve: tuple[float, ...]


def learn(
    text: InvertedText,
    users: Sequence[StudyUser],
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: Callable[[int], object],
) -> Learned:
    """Embeddings of each user from the liked references of their profile.

    Args:
        text: the copy with room for them.
        users: U users.
        num_steps: steps of Adam, one picture, timestep and noise a user and step.
        learning_rate: of Adam.
        batch_size: users learned side by side.
        seed: of the draws.
        progress: called with the number of user steps just done.
    """
    vectors, curves = [], []
    for start in range(0, len(users), batch_size):
        batch = users[start : start + batch_size]
        found = text.start(len(batch)).requires_grad_()
        optimizer = torch.optim.Adam([found], lr=learning_rate)
        latents = [_latents(user, bundle=text.bundle) for user in batch]
        curve = []
        for step in range(num_steps):
            loss = _loss(text, batch, vectors=found, latents=latents, step=step, seed=seed)
            optimizer.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            curve.append(loss.detach().sum())
            progress(len(batch))
        vectors.append(found.detach())
        curves.append(torch.stack(curve))
    total = torch.stack(curves).sum(dim=0) / len(users)
    return Learned(vectors=torch.cat(vectors), curve=tuple(float(value) for value in total))


def _shown(user: StudyUser) -> list[int]:
    """Positions of the liked references; the anchor where the profile was made of dislikes alone."""
    return user.shown("liked") or [user.anchor_position]


def _latents(user: StudyUser, *, bundle: DiffusionBundle) -> Tensor:
    mean = bundle.encode_moments(user.liked[_shown(user)]).mean.float()
    return mean * float(bundle.vae.config.scaling_factor)


def _loss(
    text: InvertedText,
    users: Sequence[StudyUser],
    *,
    vectors: Tensor,
    latents: Sequence[Tensor],
    step: int,
    seed: int,
) -> Tensor:
    """(B,) noise loss of one drawn reference of each user."""
    bundle = text.bundle
    rngs = [rng_for(seed=seed, epoch=step, key=user.user_id, purpose="inversion") for user in users]
    chosen = [int(rng.integers(len(own))) for rng, own in zip(rngs, latents, strict=True)]
    rows = torch.stack([own[i] for own, i in zip(latents, chosen, strict=True)])
    prompts = [user.history.liked[_shown(user)[i]].prompt for user, i in zip(users, chosen, strict=True)]
    timesteps = torch.tensor([int(rng.integers(len(bundle.schedule))) for rng in rngs])
    timesteps = timesteps.to(rows.device)
    noise = draw_noise([int(rng.integers(1 << 31)) for rng in rngs], shape=bundle.latent_shape).noise.to(rows)
    noisy = bundle.schedule.add(rows, noise=noise, timesteps=timesteps)
    predicted = bundle.denoise(noisy, timesteps=timesteps, text=text.encode(prompts, vectors=vectors))
    return noise_loss(predicted, latents=rows, noise=noise, timesteps=timesteps, schedule=bundle.schedule)


@torch.no_grad()
def draw_inverted(
    text: InvertedText,
    users: Sequence[StudyUser],
    *,
    vectors: Tensor,
    settings: DrawSettings,
    progress: Callable[[int], object],
) -> Tensor:
    """(U,P,3,H,W) pictures of the users' prompts from their own noise, rounded to 8 bits."""
    jobs = [(row, i) for row, user in enumerate(users) for i in range(len(user.prompts))]
    drawn = []
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        text.embedding.vectors = vectors[[row for row, _ in batch]]
        pixels = sample(
            text.bundle,
            [text.prompt(users[row].prompts[i]) for row, i in batch],
            seeds=[users[row].seeds[i] for row, i in batch],
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
        )
        drawn.append(rounded(pixels))
        progress(len(pixels))
    pictures = torch.cat(drawn)
    return pictures.reshape(len(users), -1, *pictures.shape[1:])


def draw_by_inversion(
    studio: Studio,
    users: Sequence[StudyUser],
    *,
    settings: DrawSettings,
    num_vectors: int,
    num_steps: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[int], object],
) -> tuple[Tensor, Learned]:
    """Learn and draw; ``progress`` counts user steps and pictures alike."""
    text = InvertedText.of(studio.bundle, num_vectors=num_vectors)
    learned = learn(
        text,
        users,
        num_steps=num_steps,
        learning_rate=learning_rate,
        batch_size=settings.batch_size,
        seed=seed,
        progress=progress,
    )
    drawn = draw_inverted(text, users, vectors=learned.vectors, settings=settings, progress=progress)
    return drawn, learned
