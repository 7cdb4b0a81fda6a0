import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from prefgen.checkpoint import list_checkpoints
from prefgen.errors import ConfigError
from prefgen.models.projector import load_projector
from prefgen.models.readout import load_readout
from prefgen.run import run_stage
from prefgen.stages.align.config import AlignLossConfig
from prefgen.stages.align.data import AlignData
from prefgen.stages.align.module import (
    AlignModule,
    draw_directions,
    grouped_infonce,
    grouped_mmd2,
    grouped_sliced_wasserstein,
)
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


LINE = torch.ones(1, 1)


def test_sliced_wasserstein_on_a_line_is_the_distance_of_sorted_numbers():
    ours, texts = torch.tensor([[3.0], [-1.0], [0.5], [8.0]]), torch.tensor([[2.0], [2.5], [7.0], [-4.0]])
    value = grouped_sliced_wasserstein(ours, texts, directions=LINE, group_size=4)
    # -1 with -4, 0.5 with 2, 3 with 2.5, 8 with 7
    torch.testing.assert_close(value, torch.tensor((9 + 2.25 + 0.25 + 1) / 4))
    by_pairs = grouped_sliced_wasserstein(ours, texts, directions=LINE, group_size=2)
    # groups of two: -1, 3 with 2, 2.5 and 0.5, 8 with -4, 7
    torch.testing.assert_close(by_pairs, torch.tensor((9 + 0.25 + 20.25 + 1) / 4))


def test_sliced_wasserstein_of_a_moved_set_is_how_far_it_went():
    rows, shift = _rows(16).double(), torch.tensor([3.0, 0.0, -1.0, 0.5, 2.0]).double()
    directions = draw_directions(7, width=5, seed=0, step=0)
    value = grouped_sliced_wasserstein(rows, rows + shift, directions=directions, group_size=16)
    torch.testing.assert_close(value, (directions @ shift).pow(2).mean())
    many = draw_directions(20000, width=5, seed=0, step=0)
    value = grouped_sliced_wasserstein(rows, rows + shift, directions=many, group_size=16)
    # the mean over the sphere, of which 20,000 draws leave a standard error of .8 %
    assert float(value) == pytest.approx(float(shift.pow(2).sum()) / 5, rel=0.03)


def test_sliced_wasserstein_knows_sets_not_their_order():
    directions = draw_directions(6, width=5, seed=0, step=0).float()
    ours, texts = _rows(), _rows(seed=1)
    value = grouped_sliced_wasserstein(ours, texts, directions=directions, group_size=4)
    within, across = torch.tensor([2, 0, 1, 3, 7, 6, 5, 4]), torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    same = grouped_sliced_wasserstein(ours, texts[within], directions=directions, group_size=4)
    torch.testing.assert_close(same, value)
    other = grouped_sliced_wasserstein(ours, texts[across], directions=directions, group_size=4)
    assert abs(other - value) > 1e-3
    assert grouped_sliced_wasserstein(ours, ours[within], directions=directions, group_size=4) < 1e-12


def test_sliced_wasserstein_has_the_right_gradient():
    directions = draw_directions(6, width=5, seed=0, step=0)
    ours = _rows().double().requires_grad_()

    def value(rows):
        return grouped_sliced_wasserstein(rows, _rows(seed=1).double(), directions=directions, group_size=4)

    assert torch.autograd.gradcheck(value, (ours,))


def test_directions_are_unit_rows_and_new_at_each_step():
    one, again, other = (draw_directions(9, width=5, seed=0, step=step) for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, draw_directions(9, width=5, seed=1, step=3))
    torch.testing.assert_close(one.norm(dim=1), torch.ones(9).double())


def test_point_wise_terms_join_by_their_weights(make_config):
    names = ("mse", "cosine", "infonce", "sliced_wasserstein")
    module = AlignModule(make_config(*(f"align.{name}_weight=2" for name in names)))
    module.bandwidth.fill_(1.0)
    width = module.projector.shape.text_width
    ours, texts = torch.randn(8, width), torch.randn(8, width)
    terms = module.losses(ours, own_text=texts, mmd_text=texts)
    expected = terms["mmd"] + 2 * sum(terms[name] for name in names)
    torch.testing.assert_close(terms["loss"], expected)
    same = module.losses(texts, own_text=texts, mmd_text=texts)
    assert same["mse"] == 0
    assert same["sliced_wasserstein"] < 1e-12
    assert same["cosine"] < 1e-6
    assert terms["cosine"] > 0.5


def test_sliced_wasserstein_sees_the_texts_of_the_mmd_not_the_own_ones(make_config):
    module = AlignModule(make_config("align.mmd_weight=0", "align.sliced_wasserstein_weight=3"))
    ours, others = torch.randn(8, module.projector.shape.text_width), torch.zeros(8, 1)
    terms = module.losses(ours, own_text=others.expand_as(ours), mmd_text=ours)
    assert set(terms) == {"sliced_wasserstein", "loss"}
    assert terms["loss"] < 1e-12
    terms = module.losses(ours, own_text=ours, mmd_text=others.expand_as(ours))
    torch.testing.assert_close(terms["loss"], 3 * terms["sliced_wasserstein"])
    assert terms["loss"] > 0.1


def test_no_loss_at_all_has_to_be_meant(make_config, inputs):
    with pytest.raises(ConfigError, match="sliced_wasserstein_weight are 0.*optim.learning_rate=0"):
        make_config("align.mmd_weight=0")
    config = make_config(
        "optim.learning_rate=0",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "trainer.validate_before_fit=true",
    )
    run_stage(config, verb="fit", stage="align")
    run_dir = Path(config.run_dir)
    exported = load_projector(run_dir / "projector.safetensors").projector.state_dict()
    for name, start in AlignModule(config).projector.named_parameters():
        assert torch.equal(exported[name], start), name
    assert exported["text_scale"] != 1  # what the training users fix before the first step is there
    record = json.loads((run_dir / "metrics.json").read_text())
    assert record["fit"]["val/mmd2"] == record["before"]["val/mmd2"] > 0


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
