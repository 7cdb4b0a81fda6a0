"""Run a function on several ranks on this machine: gloo, one thread each, and never longer than the limit."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _context() -> Any:
    """Processes forked from one server that has torch loaded: importing it per rank takes most of a test.

    The server itself has no threads and no process group, so forking it is safe; forking the test process
    is not. Its environment is the one of the first call: pass settings as arguments, not as variables.
    """
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo"])
    return context


def run_distributed(
    function: Callable[..., object], world_size: int, *args: object, timeout: float = 120.0
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank of a gloo group.

    Args:
        function: importable at module level (processes are spawned); what it returns must be tensors
            and plain values.
        world_size: number of processes.
        args: further arguments, picklable.
        timeout: seconds after which every process is killed.

    Returns:
        The results, by rank.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message), or the time was up.
    """
    with tempfile.TemporaryDirectory(prefix="prefgen-ranks-") as folder:
        context = _context()
        port = free_port()
        workers = [
            context.Process(target=_worker, args=(rank, world_size, port, folder, timeout, function, args))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        try:
            _wait(workers, Path(folder), timeout=timeout)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=True)["result"] for rank in range(world_size)
        ]


def _wait(workers: list[Any], folder: Path, *, timeout: float) -> None:
    limit = time.monotonic() + timeout
    while any(worker.is_alive() for worker in workers):
        errors = sorted(folder.glob("*.error"))
        if errors:
            break
        if time.monotonic() > limit:
            raise RuntimeError(f"ranks were not done after {timeout:.0f} s and were killed")
        time.sleep(0.02)
    # The first to fail is the cause; the others only saw its connection go.
    for error in sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns):
        raise RuntimeError(f"rank {error.stem} failed:\n{error.read_text(encoding='utf-8')}")
    codes = [worker.exitcode for worker in workers]
    if any(codes):
        raise RuntimeError(f"ranks ended with exit codes {codes}")


def _worker(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    timeout: float,
    function: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    try:
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=limit)
        result = function(rank, world_size, *args)
        # A rank that leaves first tears the connection down under the others.
        dist.barrier()
        dist.destroy_process_group()
        torch.save({"result": result}, Path(folder) / f"{rank}.pt")
    except BaseException:
        # The name appears only once the text is in it: the parent looks for it all the time.
        draft = Path(folder) / f"{rank}.draft"
        draft.write_text(traceback.format_exc(), encoding="utf-8")
        with contextlib.suppress(OSError):
            draft.rename(Path(folder) / f"{rank}.error")
        raise SystemExit(1) from None
