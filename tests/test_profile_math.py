"""Profiles brought up to date and combined, on plain numbers."""

from dataclasses import replace

import pytest
import torch

from prefgen.errors import CheckpointError, ConfigError
from prefgen.profile import TENSORS, ProfileCounts, UserProfile
from prefgen.profile_math import (
    Reading,
    combined_profile,
    cosine_distances,
    first_profile,
    swapped,
    updated_profile,
)

LINEAGE = {"mllm": "a" * 64, "lora": "b" * 64}
NAMES = ("a", "b", "c")


def reading(*, liked, disliked=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = {"core_embeds": 3, "sem_embeds": 6, "core_negative": 3, "sem_negative": 6}
    read = {name: torch.randn(width, generator=generator) for name, width in widths.items()}
    images = [torch.randn(count, 4, generator=generator) for count in (liked, disliked)]
    return Reading(**read, liked=images[0], disliked=images[1], draws=2)


def profile(**options):
    return first_profile(reading(**options), lineage=LINEAGE, user_id="ann")


def test_a_first_profile_holds_the_reading_the_means_and_a_real_anchor():
    read = reading(liked=3)
    first = first_profile(read, lineage=LINEAGE, user_id=None)
    assert torch.equal(first.sem_embeds, read.sem_embeds)
    torch.testing.assert_close(first.image_mean, read.liked.mean(dim=0))
    assert any(torch.equal(first.image_embeds, row) for row in read.liked)
    assert not first.image_mean_negative.any()
    assert first.counts == ProfileCounts(liked=3, disliked=0, draws=2, updates=0, combined=0)


def test_image_means_of_updates_are_those_of_all_images_together():
    whole = reading(liked=40, disliked=20)
    first = replace(whole, liked=whole.liked[:1], disliked=whole.disliked[:0])
    grown = first_profile(first, lineage=LINEAGE, user_id="ann")
    for number in range(1, 40):
        one = replace(
            whole,
            liked=whole.liked[number : number + 1],
            disliked=whole.disliked[number - 1 : number] if number <= 20 else whole.disliked[:0],
        )
        grown = updated_profile(grown, reading=one)
    torch.testing.assert_close(grown.image_mean, whole.liked.mean(dim=0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grown.image_mean_negative, whole.disliked.mean(dim=0), rtol=1e-6, atol=1e-7)
    assert (grown.counts.liked, grown.counts.disliked, grown.counts.updates) == (40, 20, 39)
    assert grown.user_id == "ann"
    # Readings that say the same leave the mean where it was.
    torch.testing.assert_close(grown.sem_embeds, whole.sem_embeds)
    for anchor, rows in ((grown.image_embeds, whole.liked), (grown.image_negative, whole.disliked)):
        assert any(torch.equal(anchor, row) for row in rows)


def test_an_update_weighs_the_readings_by_their_images():
    old, new = reading(liked=2, disliked=1, seed=1), reading(liked=1, seed=2)
    updated = updated_profile(first_profile(old, lineage={}, user_id=None), reading=new)
    for name in ("core_embeds", "sem_embeds", "core_negative", "sem_negative"):
        expected = (3 * getattr(old, name).double() + getattr(new, name).double()) / 4
        assert torch.equal(getattr(updated, name), expected.float())
    first = first_profile(old, lineage={}, user_id=None)
    assert torch.equal(updated.image_negative, first.image_negative)
    assert torch.equal(updated.image_mean_negative, first.image_mean_negative)


def test_an_anchor_that_is_nearest_to_the_new_mean_takes_over():
    old = replace(reading(liked=1), liked=torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    far, near = torch.tensor([[0.0, 9.0, 0.0, 0.0]]), torch.tensor([[0.4, 0.5, 0.0, 0.0]])
    first = first_profile(old, lineage={}, user_id=None)
    kept = updated_profile(first, reading=replace(old, liked=torch.tensor([[1.2, 0.0, 0.0, 0.0]])))
    assert torch.equal(kept.image_embeds, old.liked[0])
    moved = updated_profile(first, reading=replace(old, liked=torch.cat([near, near, far / 9])))
    assert torch.equal(moved.image_embeds, near[0])


def test_an_update_drops_words_of_the_earlier_images():
    worded = replace(profile(liked=2), likes="warm", dislikes="cold")
    updated = updated_profile(worded, reading=reading(liked=1))
    assert (updated.likes, updated.dislikes) == (None, None)


def test_combining_is_the_weighted_mean():
    first, second = profile(liked=3, disliked=2, seed=1), profile(liked=1, disliked=1, seed=2)
    both = combined_profile([first, second], weights=[1, 3], names=NAMES[:2])
    for name in (*TENSORS[:2], "core_negative", "sem_negative", "image_mean", "image_mean_negative"):
        expected = 0.25 * getattr(first, name) + 0.75 * getattr(second, name)
        torch.testing.assert_close(getattr(both, name), expected)
    assert both.counts == ProfileCounts(liked=4, disliked=3, draws=4, updates=0, combined=2)
    assert torch.equal(both.image_embeds, second.image_embeds)
    assert both.user_id == "ann"
    again = combined_profile([both, replace(first, user_id="bo")], weights=[1, 1], names=NAMES[:2])
    assert (again.counts.combined, again.user_id) == (3, None)


def test_one_profile_combined_with_itself_is_itself():
    one = profile(liked=3, disliked=2)
    same = combined_profile([one, one], weights=[1, 0.5], names=NAMES[:2])
    for name in TENSORS:
        torch.testing.assert_close(getattr(same, name), getattr(one, name))


def test_a_negative_weight_takes_the_negative_twin_and_never_leaves_the_profiles_range():
    first, second = profile(liked=3, disliked=2, seed=1), profile(liked=2, disliked=4, seed=2)
    against = combined_profile([first, second], weights=[1, -0.5], names=NAMES[:2])
    twin = combined_profile([first, swapped(second)], weights=[1, 0.5], names=NAMES[:2])
    for name in TENSORS:
        assert torch.equal(getattr(against, name), getattr(twin, name))
    assert (against.counts.liked, against.counts.disliked) == (7, 4)
    torch.testing.assert_close(against.sem_embeds, (first.sem_embeds + 0.5 * second.sem_negative) / 1.5)
    torch.testing.assert_close(
        against.image_mean_negative * 1.5, first.image_mean_negative + 0.5 * second.image_mean
    )


def test_a_negative_weight_without_disliked_images_leaves_the_liked_image_alone():
    first, second = profile(liked=3, seed=1), profile(liked=2, seed=2)
    against = combined_profile([first, second], weights=[1, -1], names=NAMES[:2])
    assert torch.equal(against.image_mean, first.image_mean)
    assert torch.equal(against.image_embeds, first.image_embeds)
    assert torch.equal(against.image_negative, second.image_embeds)
    alone = combined_profile([first], weights=[2], names=NAMES[:1])
    assert not alone.image_negative.any()
    assert not alone.image_mean_negative.any()


def test_a_weight_of_0_takes_nothing():
    first, second = profile(liked=3, seed=1), profile(liked=2, seed=2)
    both = combined_profile([first, second], weights=[0.5, 0], names=NAMES[:2])
    assert all(torch.equal(getattr(both, name), getattr(first, name)) for name in TENSORS)
    assert both.counts.liked == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0, 0], "at least one weight must be above 0, got 0,0"),
        ([-1, 0], "at least one weight must be above 0, got -1,0"),
        ([1], "1 weights for 2 profiles; give one for each"),
        ([1, float("nan")], "weights must be finite numbers, got 1,nan"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        combined_profile([profile(liked=1), profile(liked=2)], weights=weights, names=NAMES[:2])


def test_profiles_of_different_models_are_refused_by_part():
    first = profile(liked=1)
    other = replace(first, lineage={**LINEAGE, "lora": "f" * 64})
    message = (
        r"^b: this profile was made by another lora \(ffffffffffff\) than that of a \(bbbbbbbbbbbb\); build"
    )
    with pytest.raises(CheckpointError, match=message):
        combined_profile([first, other], weights=[1, 1], names=NAMES[:2])
    wider = replace(first, sem_embeds=torch.zeros(7), sem_negative=torch.zeros(7))
    with pytest.raises(CheckpointError, match="b: sem_embeds has 7 numbers, that of a has 6"):
        combined_profile([first, wider], weights=[1, 0], names=NAMES[:2])


def test_swapping_twice_gives_everything_back():
    one = replace(profile(liked=3, disliked=2), likes="warm", dislikes="cold")
    turned = swapped(one)
    assert isinstance(turned, UserProfile)
    assert torch.equal(turned.sem_embeds, one.sem_negative)
    assert (turned.likes, turned.counts.liked) == ("cold", 2)
    back = swapped(turned)
    assert back.counts == one.counts
    assert all(torch.equal(getattr(back, name), getattr(one, name)) for name in TENSORS)


def test_cosine_distances():
    one = profile(liked=2)
    assert set(cosine_distances(one, one).values()) == {0.0}
    far = cosine_distances(one, replace(one, sem_embeds=-one.sem_embeds))
    assert far["sem_embeds"] == pytest.approx(2.0)
    assert far["image_negative"] == 0.0
