"""What the ranks run; imported by name in spawned processes. Imports as little as it can."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from prefgen.mmd import MMDLoss, mmd2

WIDTH = 6


def make_rows(dtype, *, total):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(total, WIDTH, generator=generator, dtype=torch.float64)
    y = 0.7 * torch.randn(total + 3, WIDTH, generator=generator, dtype=torch.float64) + 0.4
    return x.to(dtype), y.to(dtype)


def make_model(dtype):
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Tanh(), torch.nn.Linear(8, WIDTH)).to(
        dtype
    )


CASES = [
    {"estimator": "biased", "bandwidth": "mean"},
    {"estimator": "unbiased", "bandwidth": 1.3, "multipliers": (0.5, 1.0, 3.0)},
    {"estimator": "unbiased", "kernel": "energy"},
    {"estimator": "biased", "bandwidth": "median", "weighted": True},
]


def bounds(total, rank, world):
    """Uneven on purpose: the first rank holds most rows."""
    cuts = [0, *(total * 2 // 3 + (total // 3) * r // max(1, world - 1) for r in range(world - 1)), total]
    return slice(cuts[rank], cuts[rank + 1])


def weights_for(count, dtype, *, seed):
    return (
        torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 0.1
    )


def one_case(model, x, y, case, *, parts=None, group=None):
    options = {key: value for key, value in case.items() if key != "weighted"}
    left, right = parts or (slice(None), slice(None))
    if case.get("weighted"):
        options["wx"] = weights_for(len(x), x.dtype, seed=1)[left]
        options["wy"] = weights_for(len(y), y.dtype, seed=2)[right]
    model.zero_grad()
    loss = mmd2(model(x[left]), model(y[right]), group=group, **options)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def ddp_cases(rank, world, dtype, total):
    x, y = make_rows(dtype, total=total)
    model = DistributedDataParallel(make_model(dtype))
    parts = (bounds(len(x), rank, world), bounds(len(y), rank, world))
    group = dist.group.WORLD
    results = [one_case(model, x, y, case, parts=parts, group=group) for case in CASES]
    loss = MMDLoss(bandwidth="mean", group=group)
    sigma = loss.calibrate(x[parts[0]], y[parts[1]], group=group).clone()
    blocks = mmd2(x[:12].tensor_split(world)[rank], y[:12].tensor_split(world)[rank], estimator="block",
    block_size=3,
                  bandwidth=1.0, group=group)  # fmt: skip
    return {"results": results, "sigma": sigma, "blocks": blocks}
