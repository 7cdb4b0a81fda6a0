"""``prefgen predict`` on two ranks writes what one process writes."""

import os
import subprocess
import sys

import pytest

from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.verify import verify
from prefgen.testing.stages import tiny_settings
from prefgen.testing.study import save_tiny_workdir


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_write_what_one_process_writes(tmp_path):
    workdir = save_tiny_workdir(tmp_path / "work", num_users=16)
    own = {"run_dir": tmp_path / "probe", "trainer.max_steps": 4, "trainer.val_check_interval": 4}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(verb, out, *more):
        settings = tiny_settings("probe", workdir=workdir) | own | {"embed.out": tmp_path / out}
        words = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "prefgen", verb, "--stage", "probe", *words, *more]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=580
        )
        assert done.returncode == 0, done.stderr

    run("fit", "unused")
    run("predict", "one")
    run("predict", "two", "trainer.devices=2", "trainer.strategy=ddp")
    assert verify(tmp_path / "two", num_workers=1).problems == ()
    for split in ("train", "validation", "test"):
        one, two = (EmbeddingReader(tmp_path / name, split=split) for name in ("one", "two"))
        assert (one.header, one.user_ids) == (two.header, two.user_ids)
        for position in range(len(one)):
            assert abs(one[position].sem - two[position].sem).max() < 1e-4
            assert (one[position].image == two[position].image).all()
