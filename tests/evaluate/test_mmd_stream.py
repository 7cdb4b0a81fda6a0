import argparse
import json

import numpy as np
import pytest
import torch

from prefgen.commands.mmd import add_mmd_parser
from prefgen.errors import ConfigError, DataError, PrefgenError
from prefgen.evaluate.mmd_stream import StreamOptions, stream_mmd2, stream_test
from prefgen.mmd import cmmd, mmd2, mmd_test
from prefgen.mmd.bandwidth import mean_bandwidth


def rows(count, seed, width=6, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, (count, width)).astype(np.float32)


def source(array, step=7):
    return lambda: (array[start : start + step] for start in range(0, len(array), step))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["gaussian", "energy", "rq"])
@pytest.mark.parametrize("chunk", [5, 16, 1000])
def test_streamed_value_equals_the_one_in_memory(unbiased, kernel, chunk):
    x, y = rows(37, 0) + 50, rows(23, 1, shift=0.4) + 50
    seen = []
    outcome = stream_mmd2(
        source(x), source(y), unbiased=unbiased,
        options=StreamOptions(kernel=kernel, bandwidth="mean", chunk_rows=chunk),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    want = mmd2(
        torch.from_numpy(x), torch.from_numpy(y), kernel=kernel, bandwidth="mean",
        estimator="unbiased" if unbiased else "biased",
    )  # fmt: skip
    assert outcome.mmd2 == pytest.approx(want.item(), rel=1e-5)
    assert outcome.xx + outcome.yy - 2 * outcome.xy == pytest.approx(outcome.mmd2, abs=1e-6)
    assert (outcome.rows_x, outcome.rows_y) == (37, 23)
    middle = sorted(outcome.sigma)[len(outcome.sigma) // 2]
    want_sigma = mean_bandwidth(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert kernel == "energy" or middle == pytest.approx(want_sigma, rel=1e-6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] >= 0.9 * seen[-1][1]


def test_streamed_test_equals_the_one_in_memory():
    x, y = rows(30, 0), rows(22, 1, shift=0.3)
    options = StreamOptions(bandwidth=2.0, chunk_rows=9)
    streamed = stream_test(source(x), source(y), permutations=60, seed=4, options=options)
    whole = mmd_test(torch.from_numpy(x), torch.from_numpy(y), permutations=60, seed=4, bandwidth=2.0)
    assert streamed.statistic == pytest.approx(whole.statistic, abs=1e-6)
    assert streamed.p_value == pytest.approx(whole.p_value, abs=1 / 61)
    assert streamed.std == pytest.approx(whole.std, rel=1e-4)


def test_empty_uneven_and_broken_sets_are_refused():
    x = rows(8, 0)
    with pytest.raises(DataError, match="empty"):
        stream_mmd2(lambda: iter(()), source(x))
    with pytest.raises(DataError, match="they must agree"):
        stream_mmd2(source(x), source(rows(8, 1, width=4)), options=StreamOptions(bandwidth=1.0))
    broken = x.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="NaN"):
        stream_mmd2(source(x), source(broken))
    with pytest.raises(PrefgenError, match="at least 2 rows"):
        stream_mmd2(source(x[:1]), source(x))


def command(*words):
    parser = argparse.ArgumentParser()
    add_mmd_parser(parser.add_subparsers())
    args = parser.parse_args(["mmd", *map(str, words)])
    return args.run(args)


def test_command_over_npy_files(tmp_path, capsys):
    x, y = rows(40, 0), rows(30, 1, shift=0.5)
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", x[:25])
    np.save(tmp_path / "a" / "1.npy", x[25:])
    np.save(tmp_path / "b.npy", y)
    report = tmp_path / "out" / "mmd.json"
    assert (
        command("--a", tmp_path / "a", "--b", tmp_path / "b.npy", "--permutations", 50, "--json", report) == 0
    )
    printed = capsys.readouterr().out
    assert "40 and 30" in printed
    assert "p-value" in printed
    record = json.loads(report.read_text())
    want = mmd2(torch.from_numpy(x), torch.from_numpy(y), bandwidth="median", estimator="unbiased").item()
    assert record["mmd2"] == pytest.approx(want, rel=1e-4)
    assert record["test"]["p_value"] < 0.05
    assert command("--a", tmp_path / "a", "--b", tmp_path / "b.npy", "--cmmd", "--json", report) == 0
    want = cmmd(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert json.loads(report.read_text())["cmmd"] == pytest.approx(want, rel=1e-4)


def test_command_over_embedding_shards(tmp_path):
    from prefgen.testing.data import make_embeddings

    make_embeddings(tmp_path / "shards")
    report = tmp_path / "mmd.json"
    assert command("--a", tmp_path / "shards", "--b", tmp_path / "shards", "--split-a", "train",
    "--split-b", "train",
                   "--estimator", "biased", "--json", report) == 0  # fmt: skip
    assert json.loads(report.read_text())["mmd2"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [(("--bandwidth", "wide"), ConfigError, "expected a number, 'mean' or 'median'"),
     (("--bandwidth", "-1"), ConfigError, "positive"),
     (("--device", "tpu"), ConfigError, "not one of cpu, cuda")],
)  # fmt: skip
def test_command_refuses_bad_options(words, error, message, tmp_path):
    np.save(tmp_path / "a.npy", rows(5, 0))
    with pytest.raises(error, match=message):
        command("--a", tmp_path / "a.npy", "--b", tmp_path / "a.npy", *words)


def test_command_refuses_missing_and_foreign_files(tmp_path):
    with pytest.raises(DataError, match="no embeddings at"):
        command("--a", tmp_path / "nothing", "--b", tmp_path / "nothing")
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    with pytest.raises(DataError, match="not a readable"):
        command("--a", tmp_path / "bad.npy", "--b", tmp_path / "bad.npy")
