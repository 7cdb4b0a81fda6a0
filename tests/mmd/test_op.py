"""The registered operator, torch.compile, and that the CUDA code path never waits for the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prefgen.mmd import mmd2
from prefgen.mmd.assemble import assemble_gradients, assemble_value
from prefgen.mmd.dense import BlockOptions, dense_pass
from prefgen.mmd.engine import make_problem
from prefgen.mmd.op import mmd2_op
from prefgen.mmd.spec import Spec
from prefgen.mmd.tiled import TiledPass
from prefgen.mmd.triton_pass import Launch, TritonPass


def rows(n, width=6, *, dtype=torch.float32, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(x, y, *, estimator="biased", kernel="gaussian", tile=0):
    sigma = torch.tensor([2.0, 1.0], dtype=torch.float64)
    return (x, y, None, None, sigma, sigma / 3, kernel, 1.0, False, estimator, [1.0, 1.0, 1.0], 0, "auto",
    "auto", tile,
            x.requires_grad, y.requires_grad)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("tile", [0, 4])
def test_opcheck(dtype, sides, tile):
    x, y = rows(7, dtype=dtype), rows(5, dtype=dtype, seed=1)
    x.requires_grad_(sides[0])
    y.requires_grad_(sides[1])
    # Autograd registration is checked against finite differences elsewhere; half precision has none.
    torch.library.opcheck(mmd2_op, call(x, y, tile=tile), test_utils=("test_schema", "test_faketensor",
                          "test_autograd_registration"))  # fmt: skip


@pytest.mark.parametrize("view", ["column_major", "sliced"])
def test_opcheck_of_strided_rows(view):
    x = rows(7).T.contiguous().T if view == "column_major" else rows(7, 12)[:, ::2]
    x.requires_grad_()
    torch.library.opcheck(
        mmd2_op,
        call(x, rows(5, seed=1).requires_grad_()),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  #


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_one_graph_for_several_shapes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    loss = torch.compile(
        lambda x, y: 2.0 * mmd2(x, y, bandwidth=1.5, estimator="unbiased"),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for n in (5, 9, 14):
        x, y = rows(n).requires_grad_(), rows(n + 2, seed=1)
        got = loss(x, y)
        (grad,) = torch.autograd.grad(got, x)
        want = 2.0 * mmd2(x, y, bandwidth=1.5, estimator="unbiased")
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grad, torch.autograd.grad(want, x)[0])
    assert len(graphs) == 1


def spec_for(kernel, estimator):
    return Spec(kernel=kernel, alpha=1.0, chain=kernel == "gaussian", estimator=estimator, terms=(1.0, 1.0,
    1.0),
                need_x=True, need_y=True)  # fmt: skip


class FakeKernel:
    """Stands for the Triton kernel: the launch is recorded, nothing is computed."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("path", "kernel"), [("tiled", "gaussian"), ("tiled", "energy"), ("dense", "rq"), ("triton", "gaussian")]
)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_no_host_synchronisation(path, kernel, estimator, weighted):
    # A fake tensor has no values: .item(), float(), bool() and masks raise, as they would wait on a GPU.
    with FakeTensorMode():
        x, y = torch.empty(40, 32), torch.empty(33, 32)
        sigma = torch.empty(5, dtype=torch.float64)
        wx, wy = (
            (torch.empty(40, dtype=torch.float64), torch.empty(33, dtype=torch.float64))
            if weighted
            else (None, None)
        )
        spec = spec_for(kernel, estimator)
        if path == "dense":
            options = BlockOptions(kernel=kernel, alpha=1.0, chain=False, estimator=estimator, terms=(1.0,
            1.0, 1.0),
                                   need_x=True, need_y=True)  # fmt: skip
            blocks = (None, None) if wx is None else (wx[None], wy[None])
            dense_pass(x[None], y[None], *blocks, sigma, sigma, options=options)
            return
        problem = make_problem(x, y, wx, wy, sigma, sigma, spec=spec)
        if path == "triton":
            launch = Launch(block_i=16, block_j=16, block_d=16, warps=4, stages=1)
            run = TritonPass(problem, tile=16, precision="tf32", kernel=FakeKernel(), launch=launch)
        else:
            run = TiledPass(problem, tile=16)
        sums = run.run()
        assert assemble_value(problem, sums.terms).shape == (4,)
        assert assemble_gradients(problem, sums)[0].shape == x.shape


def test_a_synchronisation_would_be_noticed():
    with (
        FakeTensorMode(),
        pytest.raises(Exception, match="DataDependent|data-dependent|aten._local_scalar_dense"),
    ):
        torch.empty(3).sum().item()


@pytest.mark.parametrize("bandwidth", ["mean", "median", "tensor"])
def test_bandwidths_do_not_synchronise(bandwidth):
    with FakeTensorMode():
        x, y = torch.empty(40, 32), torch.empty(33, 32)
        value = mmd2(x, y, bandwidth=torch.empty(()) if bandwidth == "tensor" else bandwidth, tile=16)
        assert value.shape == ()
