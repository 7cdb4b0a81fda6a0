"""Which MLLMs are looked for before anything heavy is loaded, and who makes them."""

import pytest

from prefgen.cli import main
from prefgen.inputs import SMOL_MLLM, mllm_folder


@pytest.mark.parametrize("path", ["HuggingFaceM4/idefics2-8b", "Qwen/Qwen3-VL-2B-Instruct"])
def test_a_hub_id_is_not_looked_for(path):
    assert mllm_folder(path) == ()


@pytest.mark.parametrize(
    ("path", "made_by"),
    [
        ("asset:mini/mllm", "make foundation"),
        (SMOL_MLLM, "make smol"),
        ("/models/mine", "hf download REPO --local-dir /models/mine"),
        ("./mine", "hf download REPO --local-dir ./mine"),
        ("mine", "hf download REPO --local-dir mine"),
    ],
)
def test_a_folder_is_looked_for(path, made_by):
    (needed,) = mllm_folder(path)
    assert (needed.key, needed.path, needed.member, needed.made_by) == (
        "model.mllm",
        path,
        "config.json",
        made_by,
    )


def test_the_preset_smol_without_its_model_says_how_to_make_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    assert main(["fit", "--stage", "vqa", "--preset", "smol", "data.shards=shards"]) == 2
    assert f"no multimodal LLM at {SMOL_MLLM}; run 'make smol' first" in capsys.readouterr().err
