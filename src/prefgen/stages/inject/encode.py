"""``prefgen data encode``: every liked image and prompt through the frozen encoders, once, into shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from prefgen.data.buckets import Size, nearest_bucket
from prefgen.data.encoded import EncodedFolder, EncodedImage, StoredAs
from prefgen.data.index import ShardIndex, read_index
from prefgen.data.reader import ShardReader, UserSample, decode_image
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.pixels import to_pixels
from prefgen.schema import Split
from prefgen.stages.base import shard_root
from prefgen.stages.inject.config import InjectConfig
from prefgen.stages.inject.frozen import buckets_of, encoding_header, load_bundle


def encode_shards(
    config: InjectConfig,
    *,
    out: Path,
    stored_as: StoredAs = "float16",
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> ShardIndex:
    """Encode the histories of a configuration; called again it goes on at the first shard that is missing.

    Args:
        config: pipeline, number formats, image size, histories; its batch size is that of a pass.
        out: folder of the set.
        stored_as: float16 takes half the room and moves the loss by about one part in a thousand.
        device: where to encode.
        progress: called with the shards written now and still missing at the start.

    Raises:
        DataError: a bad image, a prompt too long for the text encoder, or a folder that holds something else.
    """
    shards = shard_root(config.data.shards, loader=config.loader)
    source = read_index(shards, kind="histories")
    bundle = load_bundle(config, device=device)
    buckets = buckets_of(config, bundle=bundle)
    header = encoding_header(config, buckets=buckets)
    folder = EncodedFolder(out, header=header, source=source, stored_as=stored_as)
    missing = folder.missing()
    readers: dict[Split, ShardReader] = {}
    for done, (split, number) in enumerate(missing):
        if split not in readers:
            readers[split] = ShardReader(shards, split=split)
        users = _users(
            readers[split], number=number, bundle=bundle, buckets=buckets, batch_size=config.data.batch_size
        )
        folder.write(split, number=number, users=users)
        if progress is not None:
            progress(done + 1, len(missing))
    return folder.close()


def _users(
    reader: ShardReader, *, number: int, bundle: DiffusionBundle, buckets: tuple[Size, ...], batch_size: int
) -> Iterator[tuple[str, tuple[EncodedImage, ...]]]:
    first = sum(reader.shard_sizes[:number])
    for position in range(first, first + reader.shard_sizes[number]):
        sample = reader.read(position)
        yield sample.user_id, encode_user(sample, bundle=bundle, buckets=buckets, batch_size=batch_size)


@torch.no_grad()
def encode_user(
    sample: UserSample, *, bundle: DiffusionBundle, buckets: tuple[Size, ...], batch_size: int
) -> tuple[EncodedImage, ...]:
    """A user's liked images and their prompts, in the order of the history."""
    images = [
        decode_image(data, where=sample.image_where("liked", position=position))
        for position, data in enumerate(sample.liked)
    ]
    places = [nearest_bucket((i.height, i.width), buckets=buckets) for i in images]
    moments: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    for place in sorted(set(places)):
        rows = [row for row, own in enumerate(places) if own == place]
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            found = bundle.encode_moments(to_pixels([images[row] for row in chunk], size=buckets[place]))
            both = torch.stack([found.mean, found.std], dim=1).float().cpu().numpy()
            moments |= dict(zip(chunk, both, strict=True))
    texts = _texts([image.prompt for image in sample.history.liked], bundle=bundle, batch_size=batch_size)
    return tuple(
        EncodedImage(
            key=key,
            prompt=image.prompt,
            bucket=places[row],
            moments=moments[row],
            hidden=texts[image.prompt][0],
            pooled=texts[image.prompt][1],
        )
        for row, (key, image) in enumerate(zip(sample.keys("liked"), sample.history.liked, strict=True))
    )


_Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def _texts(
    prompts: list[str], *, bundle: DiffusionBundle, batch_size: int
) -> dict[str, tuple[_Array, _Array]]:
    distinct = list(dict.fromkeys(prompts))
    found: dict[str, tuple[_Array, _Array]] = {}
    for start in range(0, len(distinct), batch_size):
        chunk = distinct[start : start + batch_size]
        text = bundle.encode_text(chunk)
        hidden, pooled = text.hidden.float().cpu().numpy(), text.pooled.float().cpu().numpy()
        found |= {prompt: (hidden[row], pooled[row]) for row, prompt in enumerate(chunk)}
    return found
