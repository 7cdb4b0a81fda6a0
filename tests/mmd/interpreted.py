"""Runs the Triton kernels in the interpreter and prints one json line per case; started by test_triton.py.

A process of its own: whether Triton interprets is decided when it is imported.
"""

import json

import numpy as np
import torch
from reference import reference_mmd2

from prefgen.mmd import triton_kernels
from prefgen.mmd.assemble import assemble_gradients, assemble_value
from prefgen.mmd.engine import make_problem
from prefgen.mmd.spec import Spec
from prefgen.mmd.triton_pass import Launch, TritonPass

CHAIN = tuple(9.0 * 2 ** (-k / 2) for k in range(5))
CASES = [
    {"n": 37, "m": 33, "width": 40, "sigmas": CHAIN, "tile": 32},
    {"n": 41, "m": 25, "width": 16, "sigmas": (7.0, 5.0, 2.0), "estimator": "unbiased", "tile": 20},
    {"n": 29, "m": 29, "width": 18, "sigmas": (4.0,), "estimator": "ustat", "tile": 24},
    {"n": 1, "m": 35, "width": 130, "sigmas": CHAIN[:3], "weighted": True},
    {"n": 20, "m": 18, "width": 24, "sigmas": (0.003,)},
    {"n": 40, "m": 37, "width": 24, "sigmas": CHAIN, "precision": "tf32"},
    {"n": 40, "m": 37, "width": 24, "sigmas": CHAIN, "precision": "bf16"},
]


def run(case, x, y, weights):
    sigma = torch.tensor(case["sigmas"], dtype=torch.float64)
    spec = Spec(
        kernel="gaussian", alpha=1.0, chain=case["sigmas"] == CHAIN[: len(sigma)] and len(sigma) > 1,
        estimator=case.get("estimator", "biased"), terms=(1.0, 1.0, 1.0), need_x=True, need_y=True,
    )  # fmt: skip
    problem = make_problem(x, y, *weights, sigma, torch.full_like(sigma, 1 / len(sigma)), spec=spec)
    job = TritonPass(
        problem, tile=case.get("tile", 64), precision=case.get("precision", "ieee"),
        kernel=triton_kernels.pair_kernel, launch=Launch(block_i=16, block_j=16, block_d=16, warps=4,
        stages=1), interpreted=True,
    )  # fmt: skip
    sums = job.run()
    return assemble_value(problem, sums.terms)[0], *assemble_gradients(problem, sums)


def main():
    for case in CASES:
        generator = torch.Generator().manual_seed(case["n"])
        x = torch.randn(case["n"], case["width"], generator=generator) + 3
        y = 1.1 * torch.randn(case["m"], case["width"], generator=generator) + 3.1
        weights = (None, None)
        if case.get("weighted"):
            raw = [torch.rand(len(z), generator=generator, dtype=torch.float64) for z in (x, y)]
            weights = tuple(w / w.sum() for w in raw)
        first, second = (run(case, x, y, weights) for _ in range(2))
        want, want_x, want_y = reference_mmd2(
            x, y, sigmas=case["sigmas"], estimator=case.get("estimator", "biased"),
            **({"wx": weights[0], "wy": weights[1]} if case.get("weighted") else {}),
        )  # fmt: skip
        top = max(np.abs(want_x).max(), np.abs(want_y).max())
        off = max(
            np.abs(g.double().numpy() - w).max() for g, w in zip(first[1:], (want_x, want_y), strict=True)
        )
        record = {
            "value": abs(first[0].item() - want),
            "gradient": off / top if top > 1e-12 else off,
            "repeatable": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
