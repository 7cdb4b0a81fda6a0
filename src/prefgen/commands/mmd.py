"""``prefgen evaluate mmd``: MMD^2 and two-sample test between two sets of embeddings on disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prefgen.evaluate.mmd_stream import Source

FIELDS = ("image", "core", "sem")


def add_mmd_parser(subparsers: Any) -> None:
    """Add ``mmd`` to the actions of ``prefgen evaluate``."""
    text = "MMD^2 between two sets of embeddings, streamed from disk"
    parser = subparsers.add_parser("mmd", help=text, description=text + ".")
    for side in ("a", "b"):
        parser.add_argument(
            f"--{side}", type=Path, required=True, metavar="SHARDS",
            help="folder of embedding shards (with index.json), a .npy file of rows, or a folder of them",
        )  # fmt: skip
        parser.add_argument(f"--split-{side}", default="test", help="split of the shards (test)")
    parser.add_argument(
        "--field", choices=FIELDS, default="image", help="which embedding of the shards (image)"
    )
    parser.add_argument(
        "--kernel", choices=("gaussian", "laplacian", "rq", "imq", "energy"), default="gaussian"
    )
    parser.add_argument(
        "--bandwidth", default="median", help="sigma in the units of the data, 'mean' or 'median' (median)"
    )
    parser.add_argument("--estimator", choices=("unbiased", "biased"), default="unbiased")
    parser.add_argument("--cmmd", action="store_true", help="CMMD: unit rows, sigma 10, biased, times 1000")
    parser.add_argument(
        "--permutations", type=int, default=0, help="also test: this many permutations (0: no test)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the permutations (0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print, and write json if asked.

    Raises:
        ConfigError: an option that does not fit.
        DataError: a set that is missing, empty or not made of rows.
    """
    from prefgen.evaluate.mmd_stream import StreamOptions, stream_mmd2, stream_test

    options = StreamOptions(
        kernel=args.kernel,
        bandwidth=10.0 if args.cmmd else _bandwidth(args.bandwidth),
        unit_norm=args.cmmd,
        device=_device(args.device),
    )
    a = open_rows(args.a, split=args.split_a, field=args.field)
    b = open_rows(args.b, split=args.split_b, field=args.field)
    unbiased = args.estimator == "unbiased" and not args.cmmd
    with _Bar("mmd") as progress:
        outcome = stream_mmd2(a, b, unbiased=unbiased, options=options, progress=progress)
    record: dict[str, Any] = {
        "a": str(args.a), "b": str(args.b), "field": args.field, "kernel": args.kernel,
        "estimator": "unbiased" if unbiased else "biased", **asdict(outcome),
    }  # fmt: skip
    sigma = ", ".join(f"{value:.4g}" for value in outcome.sigma)
    print(f"rows      {outcome.rows_x} and {outcome.rows_y}")
    print(f"kernel    {args.kernel}, sigma {sigma}, {record['estimator']}")
    print(f"MMD^2     {outcome.mmd2:.6g}   (xx {outcome.xx:.6g}, yy {outcome.yy:.6g}, xy {outcome.xy:.6g})")
    if outcome.mmd2 < 0:
        print("          negative: the unbiased estimate of a value near 0; no difference was found")
    if args.cmmd:
        record["cmmd"] = 1000.0 * outcome.mmd2
        print(f"CMMD      {record['cmmd']:.6g}")
    if args.permutations:
        with _Bar("test") as progress:
            test = stream_test(
                a, b, permutations=args.permutations, seed=args.seed, options=options, progress=progress
            )
        record["test"] = asdict(test)
        print(f"p-value   {test.p_value:.4g}   ({test.permutations} permutations, 95 % of them below "
              f"{test.null_quantile:.4g}; standard error {test.std:.3g})")  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"written   {args.json}")
    return 0


def open_rows(path: Path, *, split: str, field: str) -> Source:
    """A source over embedding shards, a .npy file, or a folder of .npy files.

    Raises:
        DataError: nothing readable is there.
    """
    if (path / "index.json").is_file():
        return _from_shards(path, split=split, field=field)
    files = [path] if path.suffix == ".npy" else sorted(path.glob("*.npy")) if path.is_dir() else []
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"no embeddings at {path}; give a folder with index.json or .npy files, or one .npy file"
        )

    def rows() -> Iterator[NDArray[np.floating]]:
        import numpy as np

        for file in files:
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError) as error:
                raise DataError(f"{file}: not a readable .npy array ({error})") from error
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
                raise DataError(
                    f"{file}: rows must be a floating (n, D) array, got {array.dtype} {array.shape}"
                )
            for start in range(0, len(array), 2048):
                yield np.asarray(array[start : start + 2048])

    return rows


def _from_shards(path: Path, *, split: str, field: str) -> Source:
    from prefgen.data.embeddings import EmbeddingReader
    from prefgen.schema import SPLITS

    if split not in SPLITS:
        raise ConfigError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    reader = EmbeddingReader(path, split=split)  # type: ignore[arg-type]

    def rows() -> Iterator[NDArray[np.floating]]:
        for position in range(len(reader)):
            user = reader[position]
            if user is not None:
                yield getattr(user, field)

    return rows


def _bandwidth(text: str) -> float | str:
    if text in ("mean", "median"):
        return text
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"--bandwidth: expected a number, 'mean' or 'median', got {text!r}") from None
    if not 0 < value < float("inf"):
        raise ConfigError(f"--bandwidth: sigma must be positive and finite, got {text}")
    return value


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is visible; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {name!r} is not one of cpu, cuda")
    return name


class _Bar:
    """A progress bar over pairs with a rate and the time left; silent where stderr is no terminal."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __enter__(self) -> Any:
        import sys

        from tqdm import tqdm

        self.bar = tqdm(desc=self.label, unit="pair", unit_scale=True, disable=not sys.stderr.isatty())

        def progress(done: int, total: int) -> None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

        return progress

    def __exit__(self, *unused: object) -> None:
        self.bar.close()
