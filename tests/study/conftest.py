import pytest


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory):
    from prefgen.testing.study import save_tiny_workdir

    return save_tiny_workdir(tmp_path_factory.mktemp("study"), num_users=24)
