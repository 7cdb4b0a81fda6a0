"""What the loss can and cannot learn, on users whose taste can be read linearly by construction."""

import pytest
import torch

from prefgen.evaluate.alignment import retrieval, spread
from prefgen.models.projector import ProjectorShape, SemProjector
from prefgen.stages.align.config import AlignLossConfig
from prefgen.stages.align.module import (
    draw_directions,
    fixed_bandwidth,
    grouped_mmd2,
    grouped_sliced_wasserstein,
)
from stages.align.planted import SEM, TEXT, PlantedUsers, batches

TRAIN, UNSEEN = PlantedUsers(512, seed=1), PlantedUsers(64, seed=2)


def _train(*, pairing, group_size, steps=200, sliced=False):
    settings = AlignLossConfig(pairing=pairing, group_size=group_size)
    torch.manual_seed(0)
    projector = SemProjector(ProjectorShape(sem_width=SEM, text_width=TEXT, hidden_width=64))
    projector.standardise(TRAIN.first()[0], text=TRAIN.first()[1])
    bandwidth = fixed_bandwidth(TRAIN.first()[1], rule="mean")
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, batch in enumerate(batches(TRAIN, pairing=pairing, batch_size=64, steps=steps)):
        aligned, text = projector(batch.sem), batch.mmd_text
        if sliced:
            directions = draw_directions(32, width=TEXT, seed=0, step=step).float()
            loss = grouped_sliced_wasserstein(aligned, text, directions=directions, group_size=group_size)
        else:
            loss = grouped_mmd2(aligned, text, settings=settings, bandwidth=bandwidth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return projector(UNSEEN.first()[0])


@pytest.mark.parametrize(
    ("sliced", "least"),
    [
        pytest.param(False, 0.8, id="mmd"),
        pytest.param(True, 0.6, id="sliced wasserstein", marks=pytest.mark.slow),
    ],
)
def test_small_groups_of_the_same_users_teach_who_is_who(sliced, least):
    aligned, text = _train(pairing="same_users", group_size=8, sliced=sliced), UNSEEN.first()[1]
    result = retrieval(aligned, text, seed=0)
    assert result.recall_1.mean > least  # chance is .016
    assert 0.9 < spread(aligned).distance / spread(text).distance < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("pairing", ["independent", "permuted"])
def test_without_the_own_texts_nobody_is_found(pairing):
    aligned, text = _train(pairing=pairing, group_size=8), UNSEEN.first()[1]
    result = retrieval(aligned, text, seed=0)
    assert result.recall_1.mean < 0.1
    assert result.recall_10.mean < 0.4


def test_the_clouds_meet_even_where_users_do_not():
    # The reason why an MMD near zero says nothing about who is who.
    aligned, text = _train(pairing="independent", group_size=64), UNSEEN.first()[1]
    assert 0.5 < spread(aligned).distance / spread(text).distance < 1.2
    shift = (aligned.mean(dim=0) - text.mean(dim=0)).norm()
    assert shift < 0.35 * text.std(dim=0).norm()  # two samples of 64 alone differ by about .18


def test_only_the_biased_estimator_rests_where_a_user_meets_the_own_text():
    text = TRAIN.first()[1][:64]
    values = {}
    for estimator in ("biased", "unbiased", "ustat"):
        settings = AlignLossConfig(group_size=8, estimator=estimator)
        bandwidth = fixed_bandwidth(text, rule="mean")
        values[estimator] = float(grouped_mmd2(text, text, settings=settings, bandwidth=bandwidth))
    assert abs(values["biased"]) < 1e-6
    assert values["unbiased"] < -0.01
