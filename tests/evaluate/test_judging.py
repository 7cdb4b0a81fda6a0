"""What the judge may judge: readings by attribute, and the filter on the round trip."""

import pytest
import torch

from prefgen.evaluate.judges import Judgement
from prefgen.evaluate.judging import judged_attributes, read_attributes, subject_accuracy

GROUPS = {"palette": ("red", "blue", "green"), "finish": ("soft", "hard")}


def judgement(palette, finish):
    """Certain answers."""
    return Judgement(
        groups={
            "palette": torch.eye(3)[torch.tensor(palette)],
            "finish": torch.eye(2)[torch.tensor(finish)],
        },
        subjects=torch.eye(2)[torch.zeros(len(palette), dtype=torch.long)],
    )


def test_an_attribute_is_read_where_it_is_shown():
    shown = [("red", "soft"), ("red", "hard"), ("red", "soft"), ("blue", "soft"), ("unheard of",)]
    found = read_attributes(judgement([0, 0, 1, 0, 2], [0, 1, 0, 0, 0]), groups=GROUPS, shown=shown)
    assert (found["red"].accuracy, found["red"].count) == (pytest.approx(2 / 3), 3)
    assert (found["blue"].accuracy, found["blue"].count) == (0.0, 1)
    assert (found["soft"].accuracy, found["hard"].accuracy) == (1.0, 1.0)
    assert found["green"].count == 0


def test_below_the_bar_and_never_shown_leave_the_judged_set():
    shown = [("red", "soft")] * 4 + [("blue", "soft")] * 5
    found = read_attributes(judgement([0, 0, 0, 1, 1, 1, 1, 1, 0], [0] * 9), groups=GROUPS, shown=shown)
    assert judged_attributes(found, minimum=0.8) == {"blue", "soft"}  # .80 exactly stays in
    assert judged_attributes(found, minimum=0.75) == {"red", "blue", "soft"}
    assert "green" not in judged_attributes(found, minimum=0.0)


def test_subjects_are_named_among_those_of_the_evaluation():
    probabilities = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.1, 0.8]])
    names = {"subjects": ("a", "b", "c"), "prompts": ["b", "c"]}
    assert subject_accuracy(probabilities, **names, among=("a", "b", "c")) == 0.5
    assert subject_accuracy(probabilities, **names, among=("b", "c")) == 1.0
