"""One tiny pipeline folder for all tests of the diffusion models."""

import pytest


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    from prefgen.testing.diffusion import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")
