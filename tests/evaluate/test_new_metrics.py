"""What parity does not show: edges, batches, mistakes, intervals."""

import itertools

import numpy as np
import pytest
import torch

from prefgen.errors import DataError
from prefgen.evaluate.agreement import alpha_estimate, krippendorff_alpha
from prefgen.evaluate.comparing import Comparison, compare, corrected, holm, sign_flip_p
from prefgen.evaluate.likeness import HistoryDistance, HistoryLikeness, UserDiversity
from prefgen.evaluate.preference import AttributeHits
from prefgen.evaluate.set_distances import CMMD, FrechetDistance, KernelDistance, bootstrap_sets
from prefgen.evaluate.strengths import EloRatings, bradley_terry
from prefgen.evaluate.structure import linear_cka, user_cosines, verdict_cosines


def test_hits_count_groups_the_user_cares_about_and_judged_words_only():
    metric = AttributeHits(groups={"hue": ("red", "blue"), "fill": ("flat", "line")}, judged=("red", "flat"))
    probabilities = {
        "hue": torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1]]),
        "fill": torch.tensor([[0.1, 0.9], [0.7, 0.3], [0.7, 0.3]]),
    }
    wanted = [("red", "flat"), ("blue", "flat"), ("blue", "line")]  # the third wants nothing judged
    metric.update(probabilities, wanted=wanted, users=torch.tensor([4, 4, 9]))
    assert metric.user_numbers().tolist() == [4]
    assert metric.per_user().tolist() == [0.75]


def test_copies_are_seen():
    history = torch.eye(3)
    likeness, distance = HistoryLikeness(), HistoryDistance(distance="embedding")
    pictures = torch.stack([history[0], torch.ones(3)])
    likeness.update(pictures, liked=[history] * 2, users=torch.tensor([0, 1]))
    distance.update(pictures, histories=[history] * 2, users=torch.tensor([0, 1]))
    assert distance.per_user() == pytest.approx([0, 1 - 3**-0.5])
    assert likeness.per_user() == pytest.approx([1 / 3, 3**-0.5])


def test_diversity_leaves_out_users_with_one_picture_and_is_0_for_copies():
    metric = UserDiversity()
    metric.update(torch.tensor([[1.0, 0], [0, 2]]), users=torch.tensor([0, 0]))
    metric.update(torch.tensor([[1.0, 1], [1, 0], [3, 0]]), users=torch.tensor([1, 2, 2]))
    assert metric.user_numbers().tolist() == [0, 2]
    assert metric.per_user() == pytest.approx([1, 0])


def test_equal_sets_are_near_0_and_kid_needs_two_rows():
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    fid, kid, cmmd = FrechetDistance(num_features=4), KernelDistance(), CMMD()
    for real in (True, False):
        fid.update(rows, real=real)
        kid.update(rows, real=real)
    cmmd.update(x=rows, y=3 * rows)  # the norm does not matter
    assert float(fid.compute()) == pytest.approx(0, abs=1e-6)
    assert float(kid.compute()) < 0  # unbiased: equal sets lie below it
    assert float(cmmd.compute()) == pytest.approx(0, abs=1e-9)
    assert fid.compute().dtype == torch.float64
    alone = KernelDistance()
    alone.update(rows[:1], real=True)
    with pytest.raises(DataError, match="2 rows of each side, got 1 real and 0 drawn"):
        alone.compute()


def test_intervals_of_sets_stand_around_the_value():
    values = np.random.default_rng(0).normal(size=60)
    found = bootstrap_sets(
        lambda users: len(set(users.tolist())) / 60 + values[users].mean(), num_users=60, seed=1
    )
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(1 + values.mean())
    with pytest.raises(ValueError, match="at least 2 users"):
        bootstrap_sets(lambda users: 0.0, num_users=1, seed=0)


def test_sign_flips_see_a_difference_and_keep_their_level():
    rng = np.random.default_rng(0)
    assert sign_flip_p(rng.normal(1, 1, 40)) < 1e-3
    assert sign_flip_p(np.zeros(30)) == 1.0
    small = [sign_flip_p(rng.normal(0, 1, 8)) <= 0.05 for _ in range(200)]
    assert np.mean(small) < 0.1
    drawn = [sign_flip_p(rng.normal(0, 1, 20), num_flips=400) <= 0.05 for _ in range(200)]
    assert np.mean(drawn) < 0.1


def test_holm_is_monotone_and_a_family_is_corrected_together():
    assert holm([0.01, 0.04]) == pytest.approx([0.02, 0.04])
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([1.2])
    rng = np.random.default_rng(0)
    own = rng.normal(1, 1, 30)
    family = {f"c{i}": compare(own, rng.normal(0, 1, 30), seed=0, num_resamples=200) for i in range(3)}
    after = corrected(family)
    assert all(after[name].p_holm >= found.p for name, found in family.items())
    assert isinstance(after["c0"], Comparison)
    assert after["c0"].low <= after["c0"].mean <= after["c0"].high
    with pytest.raises(ValueError, match="same users"):
        compare(own, own[:3], seed=0, num_resamples=100)


def test_elo_orders_conditions_and_mirrors():
    metric = EloRatings(conditions=("a", "b", "c"), num_resamples=50)
    users = torch.arange(20)
    metric.update("a", "b", won=torch.tensor([1.0] * 15 + [0.0] * 5), users=users)
    metric.update("b", "c", won=torch.tensor([1.0] * 12 + [0.5] * 8), users=users)
    ratings = metric.ratings()
    assert ratings["a"].mean > ratings["b"].mean > ratings["c"].mean
    assert all(found.low <= found.mean <= found.high for found in ratings.values())
    assert np.mean([found.mean for found in ratings.values()]) == pytest.approx(1000)
    assert metric.compute().tolist() == pytest.approx([ratings[name].mean for name in "abc"])


def test_strengths_without_prior_need_a_loss_and_always_a_connection():
    never_lost = np.array([[0.0, 5], [0, 0]])
    assert np.isfinite(bradley_terry(never_lost)).all()
    with pytest.raises(DataError, match="never lost"):
        bradley_terry(never_lost, prior_ties=0)
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[1, 0] = apart[2, 3] = apart[3, 2] = 2
    with pytest.raises(DataError, match="never compared"):
        bradley_terry(apart)


def test_alpha_at_its_ends():
    same = np.array([[0.0, 1, 2, 0], [0, 1, 2, 0]])
    assert krippendorff_alpha(same) == pytest.approx(1)
    assert np.isnan(krippendorff_alpha(np.zeros((2, 4))))
    assert np.isnan(krippendorff_alpha(np.array([[1.0, np.nan], [np.nan, 2.0]])))
    rng = np.random.default_rng(0)
    assert abs(krippendorff_alpha(rng.integers(0, 3, (4, 400)).astype(float))) < 0.06
    found = alpha_estimate(same, seed=0, draws=100)
    assert found.mean == pytest.approx(1)
    assert found.num_users == 4
    assert alpha_estimate(np.zeros((2, 4)), seed=0) is None


def test_cka_ignores_rotation_and_scale_and_sees_noise():
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    turned = 3 * rows @ torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q + 2
    assert linear_cka(rows, turned) == pytest.approx(1, abs=1e-6)
    other = torch.randn(60, 4, generator=torch.Generator().manual_seed(2))
    assert linear_cka(rows, other) < 0.3
    with pytest.raises(ValueError, match="two sets"):
        linear_cka(rows, other[:5])


def test_draws_that_know_their_user_lie_nearer_to_each_other():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 1, 6, generator=generator)
    draws = list(centres + 0.3 * torch.randn(10, 4, 6, generator=generator))
    found = user_cosines(draws, seed=0, num_resamples=100)
    assert found.gap.low > 0.5
    noise = list(torch.randn(10, 4, 6, generator=generator))
    assert abs(user_cosines(noise, seed=0, num_resamples=100).gap.mean) < 0.2
    with pytest.raises(ValueError, match="2 draws"):
        user_cosines([torch.randn(1, 3)] * 3, seed=0)


def verdict_case(*, moved):
    """8 users, 3 histories, 2 targets each; liked targets move the embedding by so much."""
    generator = torch.Generator().manual_seed(2)
    draws, liked = [], []
    for _ in range(8):
        verdicts = torch.stack([torch.randperm(2, generator=generator) == 0 for _ in range(3)])
        step = torch.zeros(5).index_fill(0, torch.tensor([0]), moved)
        rows = torch.randn(3, 2, 5, generator=generator) + torch.where(verdicts[..., None], step, -step)
        draws.append(rows)
        liked.append(verdicts)
    return draws, liked


def test_verdict_cosines_compare_targets_behind_different_histories():
    draws, liked = verdict_case(moved=1.0)
    found = verdict_cosines(draws, liked=liked, seed=0, num_resamples=100)
    centre = torch.cat([own.flatten(0, 1) for own in draws]).double().mean(0)
    same, different = [], []
    for own, verdicts in zip(draws, liked, strict=True):
        pairs = {True: [], False: []}
        for (h, q), (k, r) in itertools.combinations(itertools.product(range(3), range(2)), 2):
            if h != k:
                rows = (own[h, q].double() - centre, own[k, r].double() - centre)
                pairs[bool(verdicts[h, q] == verdicts[k, r])].append(float(torch.cosine_similarity(*rows, 0)))
        same.append(np.mean(pairs[True]))
        different.append(np.mean(pairs[False]))
    assert found.same.mean == pytest.approx(np.mean(same))
    assert found.different.mean == pytest.approx(np.mean(different))
    assert found.gap.low > 0.2
    nothing = verdict_cosines(*verdict_case(moved=0.0)[:1], liked=liked, seed=0)
    assert nothing.gap.low < 0 < nothing.gap.high
    assert verdict_cosines(draws, liked=[torch.ones(3, 2) > 0] * 8, seed=0) is None
