"""``prefgen doctor`` says what is there, what is missing, and how to mend it."""

import pytest

from prefgen.cli import main
from prefgen.commands import doctor


def test_report(capsys):
    code = main(["doctor"])
    out = capsys.readouterr().out
    headings = ("prefgen ", "libraries: torch ", "CPU: ", "bf16 matrix products run", "GPU", "MMD backend: ")
    for words in (*headings, "mini foundation:", "presets: ", "extras:"):
        assert words in out
    assert (code == 0) == out.endswith("ready\n")


def test_missing_things_are_named_with_the_cure(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "FOUNDATION", {"CLIP": "asset:nowhere/clip/config.json"})
    monkeypatch.setattr(doctor, "EXTRAS", {"mini": ("surely_not_installed",)})
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "surely-not-installed"))
    monkeypatch.setattr(doctor, "bf16_gain", lambda: 1.0)  # timed in the test above, for seconds
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "surely-not-installed MISSING" in out
    assert "CLIP: MISSING at" in out
    assert "to mend: make foundation" in out
    assert "pip install 'prefgen[mini]'" in out
    assert out.splitlines()[-1] == "missing: surely-not-installed, mini CLIP"


def test_parts_are_found_by_a_folder_of_json_or_by_a_file_of_weights(capsys, monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["SomeModel"]}')
    (tmp_path / "weights.safetensors").write_bytes(b"\xb8" * 200_000)
    places = {"model": tmp_path / "model" / "config.json", "weights": tmp_path / "weights.safetensors"}
    monkeypatch.setattr(doctor, "FOUNDATION", {name: str(path) for name, path in places.items()})
    monkeypatch.setattr(doctor, "bf16_gain", lambda: 1.0)
    main(["doctor"])
    out = capsys.readouterr().out
    assert f"  model: {tmp_path / 'model'} (0.0 MB), SomeModel\n" in out
    assert f"  weights: {tmp_path / 'weights.safetensors'} (0.2 MB)\n" in out
    assert "weights: MISSING" not in out


def test_bf16_gain_is_a_ratio():
    assert doctor.bf16_gain(size=64) == pytest.approx(doctor.bf16_gain(size=64), rel=1e3)
    assert doctor.bf16_gain(size=64) > 0
