"""What ships in assets/mini belongs together: one part made anew makes those behind it strangers."""

from prefgen.artefacts import Artefacts
from prefgen.config import resolve_path
from prefgen.lineage import hash_file, hash_folder
from prefgen.models.projector import load_projector
from prefgen.models.user_adapter import KIND

MINI = resolve_path("asset:mini")


def hashes(*parts):
    return {part: hash_folder(MINI / "pipeline" / part) for part in parts}


def test_the_text_adapter_was_trained_on_this_pipeline():
    header, _ = KIND.read(MINI / "text_adapter.safetensors")
    assert header["lineage"] == hashes("unet", "text_encoder")


def test_the_artefacts_were_trained_on_this_foundation():
    parts = Artefacts.find(None)
    header, _ = KIND.read(parts.user_adapter)
    expected = {
        **hashes("unet", "text_encoder", "image_encoder"),
        "mllm": hash_folder(MINI / "mllm"),
        "lora": hash_folder(parts.lora),
        "projector": hash_file(parts.projector),
        "init_adapter": hash_file(MINI / "text_adapter.safetensors"),
    }
    assert {name: header["lineage"][name] for name in expected} == expected
    made_by = load_projector(parts.projector).lineage
    assert made_by["mllm"] == expected["mllm"]


def test_the_foundation_stays_under_forty_megabytes():
    """Pipeline, MLLM, judge, text adapter. What the four stages trained on it comes on top."""
    parts = [
        *(MINI / "pipeline").rglob("*"),
        *(MINI / "mllm").rglob("*"),
        *MINI.glob("judge.*"),
        *MINI.glob("text_*"),
    ]
    assert sum(part.stat().st_size for part in parts if part.is_file()) < 40e6
