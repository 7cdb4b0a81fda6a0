import os

import pytest
import torch
from safetensors.torch import save_file

from prefgen.errors import CheckpointError
from prefgen.models.artefact_file import ArtefactKind

KIND = ArtefactKind(name="thing", key="thing", version=2, stage="align")


def test_written_whole_for_everyone_and_read_back(tmp_path):
    path = tmp_path / "new" / "thing.safetensors"
    before = os.umask(0o022)
    try:
        KIND.write(path, tensors={"a": torch.arange(6.0).view(2, 3).T}, header={"words": ["x"]})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    header, tensors = KIND.read(path)
    assert header == {"words": ["x"], "version": 2}
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T)


def test_absent_torn_foreign_and_older_files_are_one_line(tmp_path):
    path = tmp_path / "thing.safetensors"
    with pytest.raises(CheckpointError, match="no thing at .* fit --stage align' first"):
        KIND.read(path)
    older = ArtefactKind(name="thing", key="thing", version=1, stage="align")
    foreign = ArtefactKind(name="other", key="other", version=2, stage="align")
    for kind in (older, foreign):
        kind.write(path, tensors={}, header={})
        with pytest.raises(CheckpointError, match="is no thing of version 2; run .* again"):
            KIND.read(path)
    path.write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="is no thing or torn: "):
        KIND.read(path)


TENSORS = {
    "a": torch.arange(6.0).view(2, 3).T,
    "half": torch.arange(3).to(torch.bfloat16),
    "flag": torch.tensor(True),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("where", [-1, -9, "three"])
def test_a_bit_that_has_turned_is_noticed(tmp_path, where):
    path = tmp_path / "thing.safetensors"
    KIND.write(path, tensors=TENSORS, header={"words": ["three"], 4: [0.1, None]})
    whole = path.read_bytes()
    assert KIND.read(path)[0] == {"words": ["three"], "4": [0.1, None], "version": 2}
    data = bytearray(whole)
    data[data.index(b"three") if where == "three" else where] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged: its sha256 .*; copy it again, or run 'prefgen fit"):
        KIND.read(path)
    KIND.write(path, tensors=TENSORS, header={"words": ["three"], 4: [0.1, None]})
    assert path.read_bytes() == whole


def test_files_from_before_there_was_a_seal_are_read(tmp_path):
    path = tmp_path / "thing.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"thing": '{"version": 2}'})
    assert KIND.read(path)[0] == {"version": 2}


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a\nb"), TypeError()])
def test_content_that_does_not_fit_is_one_line(tmp_path, error):
    with pytest.raises(CheckpointError, match="is no thing or torn: ") as caught, KIND.fitting(tmp_path):
        raise error
    assert "\n" not in str(caught.value)


def test_our_own_refusals_pass_through(tmp_path):
    with pytest.raises(CheckpointError, match="^as it was$"), KIND.fitting(tmp_path):
        raise CheckpointError("as it was")
