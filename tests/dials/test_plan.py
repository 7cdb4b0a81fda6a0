import pytest

from prefgen.dials.plan import CURVES, DialPlan
from prefgen.errors import ConfigError


def test_the_points_of_the_default_plan():
    plan = DialPlan()
    curves = plan.curves()
    assert set(curves) == set(CURVES)
    assert [p.x for p in curves["user_scale"]] == [0, 0.25, 0.5, 0.75, 1, 1.5]
    assert [p.x for p in curves["images"]] == [1, 2, 4, 8, 16]
    assert curves["user_scale"][1].other.name == "other-built-08-u0.25-n0"
    assert curves["updates"][0].own == curves["images"][0].own
    assert curves["updates"][2].own.name == "own-updated-04-u1-n0"
    assert curves["updates"][2].other == curves["images"][2].other


def test_a_condition_that_curves_share_is_drawn_once():
    plan = DialPlan()
    names = [condition.name for condition in plan.conditions()]
    assert len(names) == len(set(names)) == 46
    assert names[:2] == ["nobody", "image_only-built-08-u1-n0"]
    full = plan.curves()["user_scale"][4].own
    assert full == plan.curves()["negative_user_scale"][0].own == plan.curves()["images"][3].own


def test_every_condition_has_its_profiles():
    plan = DialPlan(images=(2, 3), reference=5)
    made = plan.profile_sets()
    assert len(made) == len(set(made))
    assert {c.profiles for c in plan.conditions() if c.profiles} <= set(made)
    assert {one.name for one in made} == {
        "built-05", "built-02", "built-03", "liked-02", "liked-03", "updated-03", "reseeded-03"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"user_scales": ()}, "--user-scales: expected ascending numbers from 0"),
        ({"negative_scales": (1.0, 0.5)}, "--negative-scales: expected ascending"),
        ({"user_scales": (-1.0, 0.5)}, r"got \(-1.0, 0.5\)"),
        ({"images": (0, 1)}, "--images: expected ascending numbers from 1"),
        ({"images": (4,)}, "needs two numbers"),
        ({"reference": 0}, "--reference must be 1 or more"),
    ],
)
def test_impossible_points_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DialPlan(**settings)
