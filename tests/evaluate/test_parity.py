"""Every metric against a published implementation or a closed form."""

import pytest

from prefgen.testing.parity import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.metric} / {case.reference}")
def test_the_largest_difference_stays_within_its_tolerance(case):
    if not case.can_run:
        pytest.skip(f"{case.package} is not installed (extra 'parity')")
    assert case.largest() <= case.tolerance


def test_a_case_can_fail():
    """A wrong metric would be seen: the tolerances are far below what a slip moves."""
    by_name = {case.metric: case for case in CASES}
    assert by_name["CMMD"].tolerance < 1e-6
    assert by_name["KernelDistance (KID)"].tolerance < 1e-6
