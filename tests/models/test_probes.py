import json

import numpy as np
import pytest
import torch

from prefgen.errors import CheckpointError, ConfigError
from prefgen.models.pooling import POOLINGS
from prefgen.models.probes import (
    CellAccuracy,
    LayerChoice,
    LayersByHand,
    ProbeGrid,
    cell_accuracies,
    choice_to_json,
    choose_layers,
    control_accuracy,
    read_choice,
    rule_words,
)


def train(grid, features, labels, *, steps=30):
    optimizer = torch.optim.AdamW(grid.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        grid.loss(features, labels=labels).sum().backward()
        optimizer.step()


def test_batched_probes_equal_probes_trained_one_by_one():
    """Measured difference below 1e-6 after 30 steps; the tolerance is 1e-5."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, 5, generator=generator) * torch.arange(1, 7)[None, :, None]
    labels = torch.randint(3, (40,), generator=generator)
    grid = ProbeGrid(num_cells=6, dim=5, num_classes=3, generator=generator)
    grid.set_statistics(features)
    singles = []
    for cell in range(6):
        single = ProbeGrid(num_cells=1, dim=5, num_classes=3, generator=generator)
        single.load_state_dict({name: value[cell : cell + 1] for name, value in grid.state_dict().items()})
        singles.append(single)
    train(grid, features, labels)
    for cell, single in enumerate(singles):
        own = features[:, cell : cell + 1]
        train(single, own, labels)
        torch.testing.assert_close(grid.weight[cell], single.weight[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(grid(features)[:, cell], single(own)[:, 0], atol=1e-4, rtol=0)


def test_a_readable_cell_is_read_and_noise_is_not():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (400,), generator=generator)
    features = torch.randn(400, 2, 8, generator=generator)
    features[:, 1, 0] += 3 * labels
    grid = ProbeGrid(num_cells=2, dim=8, num_classes=2, generator=generator)
    grid.set_statistics(features[:300])
    train(grid, features[:300], labels[:300])
    right = (grid(features[300:]).argmax(-1) == labels[300:, None]).float().mean(0)
    assert right[1] > 0.85
    assert 0.35 < right[0] < 0.65


def test_labels_of_its_own_for_each_cell():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(10, 2, 4, generator=generator)
    grid = ProbeGrid(num_cells=2, dim=4, num_classes=3, generator=generator)
    labels = torch.randint(3, (10, 2), generator=generator)
    both = grid.loss(features, labels=labels)
    for cell in range(2):
        assert torch.equal(both[cell], grid.loss(features, labels=labels[:, cell])[cell])


def test_intervals_resample_users():
    """Ten users of which each is all right or all wrong: as wide as ten coin flips, not a thousand."""
    groups = np.repeat(np.arange(10), 100)
    correct = np.repeat(np.arange(10) % 2, 100)[:, None] * np.ones((1, 4))
    (cell, *_) = cell_accuracies(correct, groups=groups, num_layers=1, seed=0)
    assert cell.accuracy == 0.5
    assert cell.num_samples == 1000
    assert 0.15 <= cell.low <= 0.25
    assert 0.75 <= cell.high <= 0.85


def grid_of(values):
    """values[layer][pooling] -> cells."""
    return [
        CellAccuracy(layer=i + 1, pooling=name, accuracy=value, low=0, high=1, num_samples=1)
        for i, row in enumerate(values)
        for name, value in zip(POOLINGS, row, strict=True)
    ]


def test_choice_by_rule_and_by_paper():
    inter = [[0.1] * 4 for _ in range(8)]
    inter[0][0] = 0.99  # low layers are no candidates
    inter[5][2] = 0.8
    intra = [[0.5] * 4 for _ in range(8)]
    for layer in (2, 4, 5, 7):
        intra[layer][3] = 0.9
    intra[6][0] = 0.95  # one good cell is not four
    choice = choose_layers(inter=grid_of(inter), intra=grid_of(intra), num_layers=8, rule="rule")
    assert (choice.core_layer, choice.core_pooling) == (6, "mean")
    assert (choice.sem_layers, choice.sem_pooling) == ((3, 5, 6, 8), "max")
    paper = choose_layers(inter=grid_of(inter), intra=grid_of(intra), num_layers=8, rule="paper")
    assert (paper.sem_layers, paper.sem_pooling) == ((5, 6, 7, 8), "last")
    assert paper.core_layer == choice.core_layer
    with pytest.raises(ConfigError, match="4 layers"):
        choose_layers(inter=grid_of(inter[:3]), intra=grid_of(intra[:3]), num_layers=3, rule="rule")


def test_what_is_given_by_hand_stands_and_the_rule_chooses_the_rest():
    inter = [[0.1] * 4 for _ in range(8)]
    inter[0][1] = 0.99  # low: a candidate only where its layer is given
    inter[5][2] = 0.8
    inter[6][1] = 0.7
    intra = [[0.5] * 4 for _ in range(8)]
    for layer in (1, 2, 3, 4):
        intra[layer][3] = 0.9
    intra[6][0] = 0.95

    def choose(**given):
        return choose_layers(
            inter=grid_of(inter),
            intra=grid_of(intra),
            num_layers=8,
            rule="by_hand",
            by_hand=LayersByHand(**given),
        )

    middle = choose(sem_layers=(6, 3, 4, 5))
    # max over layers 3 to 6 is .8 on average, every other pooling .5
    assert (middle.sem_layers, middle.sem_pooling) == ((3, 4, 5, 6), "max")
    assert (middle.core_layer, middle.core_pooling) == (6, "mean")
    top = choose(sem_layers=(5, 6, 7, 8))
    assert top.sem_pooling == "last"  # max and last hold one good layer each, and last's is better
    assert choose(sem_layers=tuple(range(1, 9)), sem_pooling="mean").sem_layers == tuple(range(1, 9))
    pooled = choose(sem_pooling="last")
    assert pooled.sem_layers == (5, 6, 7, 8)  # 7 by its accuracy, then of equals the higher
    assert (choose(core_layer=1).core_layer, choose(core_layer=1).core_pooling) == (1, "image_mean")
    assert (choose(core_pooling="image_mean").core_layer) == 7
    both = choose(core_layer=2, core_pooling="last", sem_layers=(8,), sem_pooling="mean")
    assert both == LayerChoice(sem_layers=(8,), sem_pooling="mean", core_layer=2, core_pooling="last")


def test_by_hand_is_ignored_by_the_other_rules():
    cells = grid_of([[0.5] * 4 for _ in range(8)])
    hand = LayersByHand(sem_layers=(1,), core_layer=1)
    plain = choose_layers(inter=cells, intra=cells, num_layers=8, rule="rule")
    assert choose_layers(inter=cells, intra=cells, num_layers=8, rule="rule", by_hand=hand) == plain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sem_layers": (3, 9)}, "probe.sem_layers: there is no layer 9; the MLLM has 8"),
        ({"core_layer": 12}, "probe.core_layer: there is no layer 12"),
    ],
)
def test_layers_that_are_not_there_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        LayersByHand(**given).check(num_layers=8)


def test_layers_given_by_hand_may_be_fewer_than_four():
    LayersByHand(sem_layers=(2,)).check(num_layers=2)
    with pytest.raises(ConfigError, match="sem takes 4 layers, but the MLLM has 2; pass probe.choice"):
        LayersByHand(core_layer=2).check(num_layers=2)


def test_the_written_rule_says_what_was_given():
    words = rule_words("by_hand", by_hand=LayersByHand(sem_layers=(3, 4), core_pooling="max"))
    assert words.startswith("by hand: sem layers 3, 4; core pooling max; what that leaves open by the rule:")
    assert "by hand" not in rule_words("rule", by_hand=LayersByHand())


def test_control_interval_covers_chance():
    rng = np.random.default_rng(0)
    values = [[float(v) for v in rng.normal(0.25, 0.05, 4)] for _ in range(8)]
    control = control_accuracy(grid_of(values), num_classes=4)
    assert control.low <= control.chance <= control.high
    assert control.high - control.low < 0.1


def test_choice_travels_through_json(tmp_path):
    choice = LayerChoice(sem_layers=(1, 2), sem_pooling="last", core_layer=3, core_pooling="max")
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({"choice": choice_to_json(choice)}))
    assert read_choice(path) == choice
    path.write_text(json.dumps({"choice": {"core": {"layer": 1, "pooling": "sum"}}}))
    with pytest.raises(CheckpointError, match="holds no choice"):
        read_choice(path)
    with pytest.raises(CheckpointError, match="fit --stage probe"):
        read_choice(tmp_path / "absent.json")
