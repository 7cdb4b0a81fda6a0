"""Attributes planted linearly in sem are read back on unseen users; what is not there is not made up."""

import pytest
import torch
from safetensors.torch import save_file

from prefgen.errors import CheckpointError
from prefgen.models.readout import AttributeReadout, fit_readout, load_readout, save_readout

WORDS = ("red", "round", "flat", "sketched", "everyone", "nobody")
READABLE = 3


def world(count, *, seed, width=24, noise=0.3):
    """(sem, labels): three attributes lie in sem, one is a coin, one all like, one nobody."""
    generator, plan = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    labels = torch.rand(count, len(WORDS), generator=generator) < torch.tensor([0.2, 0.5, 0.3, 0.25, 2, -1])
    directions = torch.randn(READABLE, width, generator=plan)
    sem = labels[:, :READABLE].float() @ directions + noise * torch.randn(count, width, generator=generator)
    sem[:, -1] = sem[:, -1] * 300 + 4000
    return sem, labels


@pytest.fixture(scope="module", params=[24, 300], ids=["users>width", "users<width"])
def fitted(request):
    sem, labels = world(200, seed=1, width=request.param)
    return fit_readout(sem, labels=labels, attributes=WORDS, lineage={"mllm": "aa"}), request.param


def test_planted_attributes_are_read_on_unseen_users(fitted):
    readout, width = fitted
    sem, labels = world(300, seed=2, width=width)
    right = ((readout.probabilities(sem) > 0.5) == labels).float().mean(dim=0)
    assert (right[:READABLE] > 0.97).all()


def test_what_cannot_be_read_comes_out_near_its_share(fitted):
    readout, width = fitted
    sem, labels = world(300, seed=2, width=width)
    found = readout.probabilities(sem).mean(dim=0)
    coin, everyone, nobody = found[3], found[4], found[5]
    assert abs(coin - 0.25) < 0.1
    assert readout.probabilities(sem)[:, 3].std() < 0.1
    assert everyone > 0.98
    assert nobody < 0.02
    assert torch.equal(readout.share[4:], torch.tensor([1.0, 0.0]))


def test_probabilities_mean_what_they_say_on_unseen_users():
    sem, labels = world(400, seed=3, noise=2.5)
    readout = fit_readout(sem, labels=labels, attributes=WORDS, lineage={})
    sem, labels = world(4000, seed=4, noise=2.5)
    found, truth = readout.probabilities(sem)[:, :READABLE], labels[:, :READABLE].float()
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (found >= low) & (found < low + 0.2)
        assert inside.sum() > 100
        assert abs(found[inside].mean() - truth[inside].mean()) < 0.12


def test_curves_come_from_held_out_users_where_there_are_enough():
    """Training users whose own likes were taught to the MLLM read without noise; unseen ones do not."""
    sem, labels = world(400, seed=3, noise=0.1)
    held_out, (unseen, truth) = world(400, seed=5, noise=2.5), world(2000, seed=6, noise=2.5)
    gaps = []
    for chosen in (held_out, None, tuple(part[:20] for part in held_out)):
        readout = fit_readout(sem, labels=labels, attributes=WORDS, lineage={}, held_out=chosen)
        found = readout.probabilities(unseen)[:, :READABLE]
        sure = (found - 0.5).abs() > 0.4
        gaps.append(float(((found > 0.5) != truth[:, :READABLE])[sure].float().mean()))
    assert gaps[0] < 0.06
    assert gaps[1] == gaps[2] > 0.1


def test_more_coordinates_than_users_and_no_signal_is_no_certainty():
    """Read by a fit on the same rows, pure noise would look perfectly readable."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(40, 5, generator=generator) < 0.3
    readout = fit_readout(
        torch.randn(40, 200, generator=generator), labels=labels, attributes=list("abcde"), lineage={}
    )
    found = readout.probabilities(torch.randn(100, 200, generator=generator))
    assert (found.mean(dim=0) - readout.share).abs().max() < 0.2
    assert found.max() < 0.9


def test_left_out_scores_are_those_of_fits_without_the_row():
    from prefgen.models.readout import _RIDGES, _ridge

    sem, labels = world(12, seed=5, width=4)
    rows, targets = sem.double(), labels[:, :1].double()
    rows = (rows - rows.mean(dim=0)) / rows.std(dim=0)
    weight, left_out = _ridge(rows, targets=targets)
    errors = []
    for ridge in _RIDGES:
        scores = []
        for row in range(12):
            kept = torch.arange(12) != row
            design = torch.cat([rows[kept], torch.ones(11, 1).double()], dim=1)
            penalty = torch.diag(torch.tensor([ridge * 12] * 4 + [0.0])).double()
            solved = torch.linalg.solve(design.T @ design + penalty, design.T @ targets[kept])
            scores.append(torch.cat([rows[row], torch.ones(1).double()]) @ solved)
        errors.append((float((torch.stack(scores) - targets).pow(2).mean()), torch.stack(scores)))
    torch.testing.assert_close(left_out, min(errors, key=lambda pair: pair[0])[1])
    assert weight.shape == (1, 4)


def test_words_come_likeliest_first_and_a_few_always():
    readout = AttributeReadout(
        attributes=("a", "b", "c", "d", "e"),
        sem_mean=torch.zeros(1),
        sem_scale=torch.ones(1),
        weight=torch.tensor([[0.0], [2.0], [4.0], [3.0], [-1.0]]),
        bias=torch.zeros(5),
        share=torch.full((5,), 0.5),
        num_users=10,
        lineage={},
    )
    words = readout.read(torch.ones(1))
    assert [word for word, _ in words] == ["c", "d", "b", "a"]
    assert words[0].probability == pytest.approx(0.982, abs=1e-3)
    assert [word for word, _ in readout.read(torch.ones(1), most=2, fewest=1)] == ["c", "d"]
    assert [word for word, _ in readout.read(-torch.ones(1), at_least=0.9)] == ["e", "a", "b"]


def test_the_file_gives_the_same_numbers_back(fitted, tmp_path):
    readout, width = fitted
    path = tmp_path / "new" / "attribute_readout.safetensors"
    save_readout(readout, path=path)
    loaded = load_readout(path)
    sem, _ = world(5, seed=7, width=width)
    assert all(torch.equal(getattr(loaded, n), getattr(readout, n)) for n in ("weight", "bias", "sem_scale"))
    torch.testing.assert_close(loaded.probabilities(sem), readout.probabilities(sem))
    assert (loaded.attributes, loaded.num_users, loaded.lineage) == (WORDS, 200, {"mllm": "aa"})
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    with pytest.raises(CheckpointError, match=f"takes sem of width {width}, got 3"):
        loaded.probabilities(torch.zeros(1, 3))


def test_absent_torn_and_foreign_files_are_refused(fitted, tmp_path):
    path = tmp_path / "attribute_readout.safetensors"
    with pytest.raises(CheckpointError, match="no attribute readout at .* fit --stage align"):
        load_readout(path)
    save_readout(fitted[0], path=path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is no attribute readout or torn"):
        load_readout(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="is no attribute readout of version 1"):
        load_readout(path)


def test_too_few_users_are_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="on 3 users"):
        fit_readout(torch.zeros(3, 2), labels=torch.zeros(3, 1).bool(), attributes=["a"], lineage={})
