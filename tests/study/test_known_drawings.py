"""What the judge reads on known drawings is measured once, and again where what it follows from changes."""

import json
import shutil

import pytest

from prefgen.config import resolve_path
from prefgen.evaluate.judges import Judge
from prefgen.study.conditions import open_studio
from prefgen.study.config import load_evaluate_config
from prefgen.study.drawing import Studio
from prefgen.study.known_drawings import read_known_drawings
from prefgen.study.users import load_users, prompt_pool


@pytest.fixture(scope="module")
def models(tiny_study, tmp_path_factory):
    """A copy whose judge and VAE may be changed."""
    return shutil.copytree(tiny_study / "models", tmp_path_factory.mktemp("known") / "models")


@pytest.fixture(scope="module")
def studio(tiny_study):
    config = load_evaluate_config(
        overrides=[f"workdir={tiny_study}", f"model.pipeline={tiny_study / 'models' / 'pipeline'}"]
    )
    return open_studio(config)


@pytest.fixture(scope="module")
def people(tiny_study, studio):
    return load_users(
        tiny_study / "shards",
        embeddings=tiny_study / "embeddings",
        pool=["a fox"],
        num_users=3,
        num_prompts=1,
        num_draws=1,
        image_size=studio.bundle.image_size,
        seed=0,
    )


@pytest.fixture
def read(tiny_study, models, studio, people, tmp_path, monkeypatch):
    """Reads as an evaluation would; says how many drawings were restored."""
    restored = []

    def restore(studio, pixels, *, batch_size, progress):
        restored.append(len(pixels))
        return pixels

    monkeypatch.setattr(Studio, "restored", restore)

    def run(*more, cache=None):
        restored.clear()
        config = load_evaluate_config(
            overrides=[
                f"workdir={tiny_study}",
                f"model.pipeline={models / 'pipeline'}",
                f"model.judge={models / 'judge.safetensors'}",
                f"data.feature_cache={tmp_path if cache is None else cache}",
                *([] if any("num_users" in word for word in more) else ["evaluate.num_users=2"]),
                "model.precision=float32",
                *more,
            ]
        )
        judge = Judge.load(resolve_path(config.model.judge))
        pool = prompt_pool(resolve_path(config.data.shards), known=judge.subjects)
        users = people[: config.evaluate.num_users]
        found = read_known_drawings(config, judge=judge, users=users, studio=studio, pool=pool)
        return found, sum(restored)

    return run


def test_measured_once_and_the_same_again_and_without(read, tmp_path, caplog):
    first, count = read()
    assert count == first["num_images"] == 48
    with caplog.at_level("INFO"):
        again, count = read()
    assert count == 0
    assert "is taken from" in caplog.text
    assert json.dumps(again) == json.dumps(first), "the order of words too"
    assert read(cache="") == (first, 48)
    (kept,) = tmp_path.glob("judge-*.json")
    kept.write_text(kept.read_text()[:-40])
    assert read() == (first, 48)
    assert "is damaged; the judge is measured again" in caplog.text
    assert read() == (first, 0)


def test_measured_again_where_anything_differs(read, models):
    read()
    settings = ("max_judged_images=20", "minimum_accuracy=0.5", "num_users=3", "batch_size=8")
    for change in ("seed=1", *(f"evaluate.{setting}" for setting in settings)):
        assert read(change)[1] > 0, change
        assert read(change)[1] == 0, change
    for path in (models / "judge.safetensors", *(models / "pipeline" / "vae").glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        assert read()[1] > 0, path
        assert read()[1] == 0, path


def test_a_folder_that_cannot_be_written_is_no_error(read, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert read(cache=tmp_path / "file" / "x")[1] == 48
    assert "cannot keep" in caplog.text
