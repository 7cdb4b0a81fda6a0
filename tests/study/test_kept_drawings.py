import dataclasses
import logging

import pytest
import torch

from prefgen.study import kept_drawings as module
from prefgen.study.config import load_evaluate_config
from prefgen.study.drawing import rounded
from prefgen.study.kept_drawings import KeptDrawings, kept_drawings
from prefgen.study.run import settled
from prefgen.testing.diffusion import save_tiny_pipeline

ASKED = {
    "prompts": ["a fox", "a cat"],
    "seeds": [1, 2],
    "num_steps": 2,
    "guidance_scale": 3.0,
    "batch_size": 2,
}


class Brush:
    """Draws the same two pictures each time, and counts."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return rounded(torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def ask(folder, brush, *, asked=ASKED, made_by=None):
    seen = []
    kept = KeptDrawings(folder=folder, made_by=made_by or {"pipeline": "x"})
    return kept.find_or_draw(brush, asked=asked, progress=seen.append), seen


def test_the_second_time_they_are_found_bit_for_bit(tmp_path):
    brush = Brush()
    first, seen = ask(tmp_path / "new", brush)
    assert seen == []  # whoever draws reports by itself
    again, seen = ask(tmp_path / "new", brush)
    assert seen == [2]
    assert brush.times == 1
    assert torch.equal(first, again)
    assert [path.name.partition("-")[0] for path in (tmp_path / "new").iterdir()] == ["drawn"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ["a fox", "a dog"]},
        {"seeds": [1, 3]},
        {"num_steps": 3},
        {"guidance_scale": 4.0},
        {"batch_size": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_else_is_asked_for_is_drawn(tmp_path, change):
    brush = Brush()
    ask(tmp_path, brush)
    ask(tmp_path, brush, asked=ASKED | change)
    assert brush.times == 2
    ask(tmp_path, brush, made_by={"pipeline": "y"})
    assert brush.times == 3


def test_a_damaged_file_is_drawn_again(tmp_path, caplog):
    brush = Brush()
    first, _ = ask(tmp_path, brush)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        again, _ = ask(tmp_path, brush)
    assert "the pictures are drawn again" in caplog.text
    assert brush.times == 2
    assert torch.equal(first, again)
    ask(tmp_path, brush)
    assert brush.times == 2, "the damaged file was replaced"


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        pixels, _ = ask(tmp_path / "file", Brush())
    assert len(pixels) == 2
    assert "the next evaluation draws again" in caplog.text


def test_sets_that_would_fill_a_disk_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    ask(tmp_path / "new", Brush())
    assert not (tmp_path / "new").exists()


def test_another_pipeline_or_precision_is_another_set(tmp_path):
    pipeline = save_tiny_pipeline(tmp_path / "pipeline")
    config = settled(load_evaluate_config(overrides=[f"workdir={tmp_path}", f"model.pipeline={pipeline}"]))
    first = kept_drawings(config)
    assert first == kept_drawings(config)
    model = dataclasses.replace(config.model, precision="bfloat16")
    assert kept_drawings(dataclasses.replace(config, model=model)) != first
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + " ")
    assert kept_drawings(config) != first


def test_nothing_is_kept_without_a_folder_or_of_a_pipeline_on_a_hub(tmp_path):
    words = [f"workdir={tmp_path}", "model.pipeline=nobody/some-pipeline"]
    assert kept_drawings(settled(load_evaluate_config(overrides=words))) is None
    pipeline = save_tiny_pipeline(tmp_path / "pipeline")
    words = [f"workdir={tmp_path}", f"model.pipeline={pipeline}", "data.feature_cache="]
    assert kept_drawings(settled(load_evaluate_config(overrides=words))) is None
