import pytest

from prefgen.errors import DataError
from prefgen.models.user_schedule import CONSTANT, UserSchedule, layer_factors

NAMES = (
    "down_blocks.0.attentions.0.attn2.processor",
    "down_blocks.1.attentions.0.attn2.processor",
    "down_blocks.10.attentions.0.attn2.processor",
    "mid_block.attentions.0.attn2.processor",
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (UserSchedule(), (1, 1, 1, 1, 1)),
        (UserSchedule(shape="linear"), (0, 0.25, 0.5, 0.75, 1)),
        (UserSchedule(shape="early"), (1, 1, 0, 0, 0)),
        (UserSchedule(shape="late"), (0, 0, 1, 1, 1)),
        (UserSchedule(start=0.4), (0, 0, 1, 1, 1)),
        (UserSchedule(until=0.4), (1, 1, 0, 0, 0)),
        (UserSchedule(shape="linear", start=0.2, until=0.8), (0, 0, 0.5, 1, 0)),
        (UserSchedule(shape="linear", start=0.4, until=0.6), (0, 0, 1, 0, 0)),
        (UserSchedule(start=0.0, until=0.05), (0, 0, 0, 0, 0)),
    ],
)
def test_factors_of_five_steps(schedule, expected):
    assert schedule.factors(5) == expected


@pytest.mark.parametrize("count", [1, 4, 25])
def test_early_and_late_share_the_steps_between_them(count):
    early, late = (UserSchedule(shape=shape).factors(count) for shape in ("early", "late"))
    assert [one + other for one, other in zip(early, late, strict=True)] == [1.0] * count


def test_only_the_constant_one_is_plain():
    assert CONSTANT.is_plain
    assert not UserSchedule(until=0.9).is_plain


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.5), (-0.1, 1), (0, 1.1), (float("nan"), 1)])
def test_windows_that_are_none_are_refused(window):
    with pytest.raises(DataError, match="0 <= from < until <= 1 is needed"):
        UserSchedule(start=window[0], until=window[1])


def test_an_unknown_shape_is_refused():
    with pytest.raises(DataError, match="schedule 'cosine' is not one of constant, linear, early, late"):
        UserSchedule(shape="cosine")


def test_the_longest_beginning_decides():
    assert layer_factors(NAMES, blocks={"down": 0.5, "down_blocks.1": 0.0}) == (0.5, 0.0, 0.5, 1.0)
    assert layer_factors(NAMES, blocks={"mid": 2.0}) == (1.0, 1.0, 1.0, 2.0)


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(
        DataError, match="no cross-attention is in block 'up'; this UNet has down_blocks.0, .*mid"
    ):
        layer_factors(NAMES, blocks={"up": 1.0})
    with pytest.raises(DataError, match="in block ''"):
        layer_factors(NAMES, blocks={"": 1.0})
    with pytest.raises(DataError, match="scale of block 'mid' must be a finite number, got inf"):
        layer_factors(NAMES, blocks={"mid": float("inf")})
