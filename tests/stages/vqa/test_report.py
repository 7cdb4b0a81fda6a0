import numpy as np
import pytest

from prefgen.models.calibration import reliability
from prefgen.models.scoring import LikeScores
from prefgen.stages.vqa.report import calibration_error


def answers(*, num_users, each, shift=0.0, seed=0):
    """Users whose images are liked with the stated probability, or with one that is off by ``shift``."""
    rng = np.random.default_rng(seed)
    stated = rng.uniform(0.2, 0.8, num_users * each)
    return LikeScores(
        probability=stated,
        liked=rng.random(num_users * each) < stated - shift,
        user=np.repeat(np.arange(num_users), each),
        num_users=num_users,
    )


def test_the_interval_is_around_the_error_and_narrows_with_users():
    widths = []
    for num_users in (20, 320):
        scores = answers(num_users=num_users, each=8, shift=0.15)
        found = calibration_error(scores, seed=0)
        assert found.mean == pytest.approx(reliability(scores.probability, truth=scores.liked).error)
        assert found.low < found.mean < found.high
        assert found.num_users == num_users
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2
    assert found.low > 0.1, "what is off by .15 is seen"


def test_users_are_resampled_and_not_answers():
    """Every answer copied nine times over within its user says no more."""
    scores = answers(num_users=40, each=2)
    copied = LikeScores(
        probability=np.repeat(scores.probability, 9),
        liked=np.repeat(scores.liked, 9),
        user=np.repeat(scores.user, 9),
        num_users=40,
    )
    one, nine = (calibration_error(given, seed=0) for given in (scores, copied))
    assert (one.low, one.mean, one.high) == pytest.approx((nine.low, nine.mean, nine.high))


def test_no_error_is_below_zero_and_users_without_answers_do_not_count():
    sure = LikeScores(
        probability=np.array([0.0, 1.0, 1.0]),
        liked=np.array([False, True, True]),
        user=np.array([0, 0, 5]),
        num_users=9,
    )
    found = calibration_error(sure, seed=0)
    assert (found.low, found.mean, found.high, found.num_users) == (0, 0, 0, 2)
