"""What stage inject trains against and never changes: the pipeline and the projector, checked to fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefgen.config import resolve_path
from prefgen.data.buckets import Size, make_buckets
from prefgen.data.embeddings import check_lineage
from prefgen.data.index import index_hash, read_index
from prefgen.errors import CheckpointError
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.ip_adapter import AdapterSource
from prefgen.models.projector import SemProjector, load_projector
from prefgen.stages.base import shard_root
from prefgen.stages.inject.config import InjectConfig
from prefgen.stages.inject.users import EmbeddingFacts

log = logging.getLogger(__name__)


def load_bundle(config: InjectConfig, *, device: str | torch.device = "cpu") -> DiffusionBundle:
    """The frozen pipeline of a configuration."""
    model, side = config.model, config.data.image_size
    return DiffusionBundle.load(
        str(resolve_path(model.pipeline)),
        device=device,
        dtype=getattr(torch, model.frozen_dtype),
        vae_dtype=getattr(torch, model.vae_dtype),
        image_encoder=None if model.image_encoder is None else str(resolve_path(model.image_encoder)),
        memory_format=model.memory_format,
        size=None if side is None else (side, side),
    )


def buckets_of(config: InjectConfig, *, bundle: DiffusionBundle) -> tuple[Size, ...]:
    """Sizes of the targets."""
    ratio = config.data.max_aspect_ratio
    return make_buckets(size=bundle.image_size, step=bundle.size_step, max_ratio=ratio)


def encoding_header(config: InjectConfig, *, buckets: Sequence[Size]) -> dict[str, Any]:
    """What decides the numbers of an encoded set: encoders, their formats, sizes, histories."""
    pipeline, model = resolve_path(config.model.pipeline), config.model
    parts = [part for part in ("vae", "text_encoder", "text_encoder_2") if (pipeline / part).is_dir()]
    return {
        **{part: hash_folder(pipeline / part) for part in parts},
        "text_dtype": model.frozen_dtype,
        "vae_dtype": model.vae_dtype,
        "sizes": [list(size) for size in buckets],
        "shards": index_hash(shard_root(config.data.shards, loader=config.loader)),
    }


def check_encoded(config: InjectConfig, *, buckets: Sequence[Size]) -> None:
    """Refuse an encoded set of other encoders, sizes or histories than those of the configuration.

    Raises:
        CheckpointError: naming what differs.
    """
    if config.data.encoded is None:
        return
    folder = resolve_path(config.data.encoded)
    check_lineage(
        read_index(folder, kind="encoded").header,
        expected=encoding_header(config, buckets=buckets),
        where=folder,
        mend="run 'prefgen data encode' with this configuration into another folder",
    )


def load_aligner(
    config: InjectConfig, *, facts: EmbeddingFacts
) -> tuple[SemProjector | None, dict[str, str]]:
    """The projector, where ``aligned`` is a part, and the lineage of what will be trained.

    Raises:
        CheckpointError: projector and embeddings come from different models.
    """
    lineage = dict(facts.lineage)
    pipeline = resolve_path(config.model.pipeline)
    if (pipeline / "unet").is_dir():
        lineage["unet"] = hash_folder(pipeline / "unet")
    if "image" in config.model.parts:
        _check_image_encoder(config, lineage=lineage)
    if "aligned" not in config.model.parts:
        return None, lineage
    path = resolve_path(config.model.projector)
    loaded = load_projector(path)
    # The text encoder is no part of the embeddings; it is compared with the pipeline's own below.
    expected = {name: value for name, value in loaded.lineage.items() if name != "text_encoder"}
    check_lineage(
        facts.lineage,
        expected=expected,
        where=f"{config.data.embeddings} beside {path}",
        mend=f"run 'prefgen fit --stage align workdir={config.workdir}' on these embeddings",
    )
    part = loaded.text.get("text_encoder", "text_encoder")
    if "text_encoder" in loaded.lineage and (pipeline / part).is_dir():
        lineage["text_encoder"] = hash_folder(pipeline / part)
        if lineage["text_encoder"] != loaded.lineage["text_encoder"]:
            raise CheckpointError(
                f"{path} maps into the text space of another pipeline than {config.model.pipeline}; run "
                f"'prefgen fit --stage align workdir={config.workdir}' with this model.pipeline"
            )
    if loaded.projector.shape.sem_width != facts.sem_width:
        raise CheckpointError(
            f"{path} takes sem embeddings of width {loaded.projector.shape.sem_width}, but "
            f"{config.data.embeddings} holds {facts.sem_width}; fit stage align on these embeddings"
        )
    return loaded.projector, {**lineage, "projector": hash_file(path)}


def warn_of_another_unet(source: AdapterSource, *, lineage: Mapping[str, str]) -> None:
    """One of another UNet of this size loads without complaint; it may be meant, as for a fine-tuned UNet."""
    theirs, own = source.lineage.get("unet"), lineage.get("unet")
    if theirs and own and theirs != own:
        log.warning(
            "model.init_adapter=%s was trained for another UNet of the same layers than model.pipeline's; "
            "pass the file made with this pipeline, or null to start from its text projections",
            source.path,
        )


def _check_image_encoder(config: InjectConfig, *, lineage: Mapping[str, str]) -> None:
    own = config.model.image_encoder
    folder = resolve_path(config.model.pipeline) / "image_encoder" if own is None else resolve_path(own)
    if "image_encoder" in lineage and folder.is_dir():
        check_lineage(
            lineage,
            expected={"image_encoder": hash_folder(folder)},
            where=f"{config.data.embeddings} beside {folder}",
            mend="pass the image encoder of the embeddings as model.image_encoder, or predict them again",
        )
