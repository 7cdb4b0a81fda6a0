import pytest

from prefgen.errors import DataError
from prefgen.lineage import hash_file, hash_folder, hash_json


def test_one_byte_or_one_name_makes_another_model(tmp_path):
    def folder(name, *, weights=b"abc", file="model.safetensors", config=b"1"):
        path = tmp_path / name
        path.mkdir()
        (path / file).write_bytes(weights)
        (path / "config.json").write_bytes(config)
        return hash_folder(path)

    first = folder("a")
    assert first == folder("b", config=b"2")
    assert len({first, folder("c", weights=b"abd"), folder("d", file="model-2.safetensors")}) == 3


def test_what_cannot_be_hashed_is_said_in_words(tmp_path):
    with pytest.raises(DataError, match="no safetensors weights in"):
        hash_folder(tmp_path)
    with pytest.raises(DataError, match="cannot read .*absent"):
        hash_file(tmp_path / "absent")


def test_order_of_keys_does_not_count():
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1}) != hash_json({"a": 1, "b": [3]})
