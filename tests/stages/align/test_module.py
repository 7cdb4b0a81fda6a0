import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from prefgen.checkpoint import list_checkpoints
from prefgen.models.projector import load_projector
from prefgen.models.readout import load_readout
from prefgen.run import run_stage
from prefgen.stages.align.config import AlignLossConfig
from prefgen.stages.align.data import AlignData
from prefgen.stages.align.module import AlignModule, grouped_infonce, grouped_mmd2
from prefgen.testing.data import HUES


@pytest.fixture
def module(make_config):
    return AlignModule(make_config())


def _rows(count=8, seed=0):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_loss_is_the_mean_over_groups_not_over_the_batch():
    ours, texts, sigma = _rows(), _rows(seed=1), torch.tensor(1.5)
    settings = AlignLossConfig(group_size=4)
    whole = grouped_mmd2(ours, texts, settings=settings, bandwidth=sigma)
    parts = [
        grouped_mmd2(ours[i : i + 4], texts[i : i + 4], settings=settings, bandwidth=sigma) for i in (0, 4)
    ]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    moved = grouped_mmd2(ours, texts[order], settings=settings, bandwidth=sigma)
    torch.testing.assert_close(moved, whole)
    across = torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    assert abs(grouped_mmd2(ours, texts[across], settings=settings, bandwidth=sigma) - whole) > 1e-4


def test_infonce_knows_each_user_inside_its_group_only():
    settings = AlignLossConfig(group_size=2)
    rows = _rows(4)
    assert grouped_infonce(rows, rows, settings=settings) < 0.1
    swapped = rows[torch.tensor([1, 0, 3, 2])]
    assert grouped_infonce(rows, swapped, settings=settings) > 5


def test_point_wise_terms_join_by_their_weights(make_config):
    names = ("mse", "cosine", "infonce")
    module = AlignModule(make_config(*(f"align.{name}_weight=2" for name in names)))
    module.bandwidth.fill_(1.0)
    width = module.projector.shape.text_width
    ours, texts = torch.randn(8, width), torch.randn(8, width)
    terms = module.losses(ours, own_text=texts, mmd_text=texts)
    expected = terms["mmd"] + 2 * sum(terms[name] for name in names)
    torch.testing.assert_close(terms["loss"], expected)
    same = module.losses(texts, own_text=texts, mmd_text=texts)
    assert same["mse"] == 0
    assert same["cosine"] < 1e-6
    assert terms["cosine"] > 0.5


def test_initial_weights_follow_the_seed_alone(make_config):
    torch.manual_seed(1)
    first = AlignModule(make_config())
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = AlignModule(make_config())
    assert torch.equal(torch.random.get_rng_state(), before)
    other = AlignModule(make_config("seed=3"))
    assert torch.equal(first.projector.up.weight, second.projector.up.weight)
    assert not torch.equal(first.projector.up.weight, other.projector.up.weight)


def test_fit_validate_and_test_from_config_to_artefact(make_config, inputs):
    config = make_config("trainer.validate_before_fit=true", "optim.learning_rate=1e-2")
    run_stage(config, verb="fit", stage="align")
    for verb in ("validate", "test"):
        run_stage(config, verb=verb, stage="align")
    run_dir = Path(config.run_dir)
    record = json.loads((run_dir / "metrics.json").read_text())
    text = json.dumps(record)
    for name in ("val/mmd2", "val/recall_1", "val/permuted_recall_10_high", "val/separability", "test/mmd2"):
        assert name in text
    # Two orders of one hue are one text, so the ceiling here is what equal texts of several users leave.
    assert record["fit"]["val/ceiling_recall_1"] >= record["fit"]["val/chance_1"]
    assert all(math.isfinite(value) for value in _numbers(record))

    words = json.loads((run_dir / "attributes-val.json").read_text())["attributes"]
    assert set(words) <= set(HUES)
    assert {"sem", "aligned"} == set(next(iter(words.values())))

    readout = load_readout(run_dir / "attribute_readout.safetensors")
    assert set(readout.attributes) <= set(HUES)
    assert readout.num_users == 20
    assert readout.lineage["lora"] == "bb"

    path = run_dir / "projector.safetensors"
    loaded = load_projector(path)
    assert loaded.lineage["mllm"] == "aa"
    assert len(loaded.lineage["text_encoder"]) == 64
    assert loaded.text == {"text_encoder": "text_encoder", "text_pooling": "pooled"}
    with safe_open(path, framework="pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    module = AlignModule(config)
    assert stored == sum(value.numel() for value in module.projector.state_dict().values())
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert set(held) == {f"projector.{name}" for name in module.projector.state_dict()} | {"bandwidth"}


def _numbers(record):
    if isinstance(record, dict):
        for value in record.values():
            yield from _numbers(value)
    elif isinstance(record, float):
        yield record


def test_training_lowers_the_mmd(make_config):
    config = make_config(
        "trainer.validate_before_fit=true",
        "trainer.max_steps=80",
        "trainer.val_check_interval=80",
        "optim.learning_rate=1e-2",
    )
    result = run_stage(config, verb="fit", stage="align")
    record = json.loads((Path(config.run_dir) / "metrics.json").read_text())
    before = record["before"]["val/mmd2"]
    assert result.metrics["val/mmd2"] < before


def test_data_seen_and_text_bank_are_pure_functions_of_the_seed(make_config):
    def batches(seed):
        data = AlignData(make_config(f"seed={seed}"))
        data.setup("fit")
        return list(data.train_dataloader())

    first, second, other = batches(0), batches(0), batches(1)
    assert len(first) == 2
    for one, two in zip(first, second, strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.sem, two.sem)
        assert torch.equal(one.own_text, two.own_text)
    assert [batch.keys for batch in first] != [batch.keys for batch in other]
