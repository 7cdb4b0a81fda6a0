"""Trained-only state dicts and the refusal of every checkpoint that does not fit."""

import pytest
import torch
from torch import nn

from prefgen.checkpoint import (
    check_trained,
    checkpoint_name,
    keep_trained,
    list_checkpoints,
    read_checkpoint,
    stored_names,
)
from prefgen.errors import CheckpointError


def model():
    net = nn.Module()
    net.frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    net.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer("mean", torch.zeros(2))
    net.register_buffer("table", torch.zeros(2), persistent=False)
    return net


HEAD = {
    "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "head.1.running_mean",
    "head.1.running_var", "head.1.num_batches_tracked",
}  # fmt: skip


def test_what_is_stored():
    """Buffers go with the nearest module that has parameters: the root trains, so its buffer is stored."""
    assert stored_names(model()) == HEAD | {"mean"}


def test_one_trained_part_inside_a_frozen_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    net[1].bias.requires_grad_(True)
    assert stored_names(net) == {"1.bias"}


def test_kept_and_checked_round_trip():
    net = model()
    kept = keep_trained(net.state_dict(), module=net)
    assert kept.keys() == HEAD | {"mean"}
    check_trained(kept, module=model(), where="x.ckpt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("head.0.bias"), "x.ckpt lacks 1 trained tensors, first head.0.bias"),
        (
            lambda d: d.update({"frozen.0.weight": torch.zeros(2, 2)}),
            "do not train here, first frozen.0.weight",
        ),
        (lambda d: d.update({"other": torch.zeros(1)}), "do not train here, first other"),
        (
            lambda d: d.update({"head.0.bias": torch.zeros(3)}),
            r"head.0.bias has shape \(3,\), .* needs \(2,\)",
        ),
    ],
)
def test_state_that_does_not_fit(change, words):
    net = model()
    state = keep_trained(net.state_dict(), module=net)
    change(state)
    with pytest.raises(CheckpointError, match=words):
        check_trained(state, module=net, where="x.ckpt")


def save(path, **changes):
    content = {"state_dict": {}, "hyper_parameters": {"stage": "align"}, **changes}
    torch.save(content, path)
    return path


def test_reading(tmp_path):
    assert read_checkpoint(save(tmp_path / "a.ckpt"), stage="align")["state_dict"] == {}


class Foreign:
    """Needs code to load."""


def test_reading_what_is_none(tmp_path):
    cases = {
        "no checkpoint at": tmp_path / "absent.ckpt",
        "belongs to stage 'vqa', not 'align'": save(tmp_path / "b.ckpt", hyper_parameters={"stage": "vqa"}),
        "belongs to stage None": save(tmp_path / "c.ckpt", hyper_parameters={}),
        "cannot be read": save(tmp_path / "d.ckpt", thing=Foreign()),
    }
    torn = save(tmp_path / "e.ckpt")
    torn.write_bytes(torn.read_bytes()[:100])
    empty = tmp_path / "f.ckpt"
    empty.write_bytes(b"")
    other = tmp_path / "g.ckpt"
    torch.save([1, 2], other)
    for words, path in [
        *cases.items(),
        ("cannot be read", torn),
        ("cannot be read", empty),
        ("is no", other),
    ]:
        with pytest.raises(CheckpointError, match=words) as caught:
            read_checkpoint(path, stage="align")
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_listing(tmp_path):
    for name in (
        checkpoint_name(20),
        checkpoint_name(3),
        "best.ckpt",
        "step-00000099.ckpt.part",
        "step-x.ckpt",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003.ckpt", "step-00000020.ckpt"]
    assert list_checkpoints(tmp_path / "absent") == []
