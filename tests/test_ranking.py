from dataclasses import replace

import pytest
import torch

from prefgen.errors import CheckpointError
from prefgen.profile import ProfileCounts, UserProfile
from prefgen.ranking import MEANINGS, Scores, scores_by_vectors


def make_profile(*, liked, disliked=None):
    liked = torch.tensor(liked)
    mean = torch.zeros_like(liked) if disliked is None else torch.tensor(disliked)
    zeros = {name: torch.zeros(2) for name in ("core_embeds", "sem_embeds", "core_negative", "sem_negative")}
    return UserProfile(
        **zeros,
        image_embeds=liked,
        image_negative=mean,
        image_mean=liked,
        image_mean_negative=mean,
        counts=ProfileCounts(liked=3, disliked=0 if disliked is None else 2, draws=1),
    )


def test_half_at_either_mean_and_0_between():
    profile = make_profile(liked=[10.0, 2.0, 0.0], disliked=[10.0, 0.0, 0.0])
    rows = torch.tensor(
        [[10.0, 2.0, 0.0], [10.0, 0.0, 0.0], [10.0, 1.0, 0.0], [90.0, 1.0, 7.0], [10.0, 4.0, 0.0]]
    )
    scores = scores_by_vectors(profile, embeds=rows)
    assert scores.values.tolist() == [0.5, -0.5, 0.0, 0.0, 1.5]
    assert scores.scored_by == "both means"
    assert scores.order() == [4, 0, 2, 3, 1]


def test_the_sign_says_which_mean_is_nearer():
    generator = torch.Generator().manual_seed(0)
    liked, disliked = torch.randn(2, 6, generator=generator)
    rows = torch.randn(50, 6, generator=generator)
    profile = make_profile(liked=liked.tolist(), disliked=disliked.tolist())
    values = scores_by_vectors(profile, embeds=rows).values
    nearer = (rows - liked).norm(dim=1) < (rows - disliked).norm(dim=1)
    assert torch.equal(values > 0, nearer)


def test_without_disliked_images_the_direction_alone_counts():
    profile = make_profile(liked=[1.0, 0.0])
    scores = scores_by_vectors(profile, embeds=torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
    assert scores.values.tolist() == [1.0, 0.0, -1.0]
    assert scores.scored_by == "liked mean"
    same = replace(make_profile(liked=[1.0, 0.0], disliked=[1.0, 0.0]))
    assert scores_by_vectors(same, embeds=torch.ones(1, 2)).scored_by == "liked mean"


def test_another_width_is_refused():
    with pytest.raises(CheckpointError, match="makes 3 numbers an image, the profile has 2"):
        scores_by_vectors(make_profile(liked=[1.0, 0.0]), embeds=torch.ones(1, 3))


def test_equals_keep_their_order_and_every_source_is_explained():
    scores = Scores(values=torch.tensor([0.2, 0.5, 0.2]), scored_by="mllm")
    assert scores.order() == [1, 0, 2]
    assert set(MEANINGS) == {"both means", "liked mean", "mllm", "calibrated mllm"}
