"""Importer of PIPBench: ``metadata.json`` of ``{id, image_id, category, prompt, ref_images, gt_images}``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefgen.data.sources.base import Batch, Desk, Judgement, Opened, Section
from prefgen.data.sources.files import json_list, read_image, source_folder, text_field, text_list
from prefgen.errors import DataError

LAYOUT = "metadata.json and the images it names"


def open_source(path: Path) -> Opened:
    """Look at a folder of PIPBench.

    Args:
        path: holds ``metadata.json``; image paths are relative to it.

    Raises:
        DataError: no such folder, or no metadata in it.
    """
    root = source_folder(path, layout=LAYOUT)
    file = root / "metadata.json"
    if not file.is_file():
        raise DataError(f"{root}: no metadata.json; expected {LAYOUT}")

    def read(start: int, desk: Desk) -> Iterator[Batch]:
        for number, record, done in json_list(file):
            if number < start:
                continue
            where = f"{file}: record {number}"
            user_id = text_field(record, name="id", where=where)
            prompt = text_field(record, name="prompt", where=where)
            names = [(name, "") for name in text_list(record, name="ref_images", where=where)]
            names += [(name, prompt) for name in text_list(record, name="gt_images", where=where)]
            judgements = tuple(
                Judgement(
                    user_id=user_id,
                    verdict="liked",
                    image=read_image(name, root=root, where=where),
                    prompt=text,
                    where=where,
                )
                for name, text in names
            )
            yield Batch(position=number + 1, done=done, judgements=judgements)

    section = Section(name=file.name, files=(file,), size=file.stat().st_size, read=read)
    notes = (
        "reference and ground truth images count as liked; the source knows no disliked ones",
        "the prompt of a record belongs to its ground truth images; those of the references are unknown",
    )
    return Opened(importer="pipbench", root=root, source="human", sections=(section,), notes=notes)
