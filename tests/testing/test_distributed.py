import pytest

from prefgen.testing.distributed import run_distributed
from rank_functions import add_up, fail_on_last


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_talk_and_a_failing_one_is_named():
    assert run_distributed(add_up, 2, 10) == [21.0, 21.0]
    with pytest.raises(RuntimeError, match="rank 1 failed(.|\n)*rank had enough"):
        run_distributed(fail_on_last, 2, timeout=60)
