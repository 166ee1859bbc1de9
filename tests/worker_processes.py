"""Workers of a gloo group, without Ray.

They are forks of a process that has the training imported, which takes an interpreter seconds and a fork next to none.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE_S = 300.0

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pytest", "mpscl_ray.train.loop", "torch._dynamo"])


def on_workers(number: int, job: Callable[..., T], *arguments: Any) -> list[T]:
    """What ``job(*arguments)`` returns on each worker, by rank; one worker has no process group.

    Job, arguments and results are pickled. A warning is an error. The first worker that fails ends them all.
    """
    with tempfile.TemporaryDirectory() as meeting:
        processes, results = [], {}
        for rank in range(number):
            receiver, sender = _FORKS.Pipe(duplex=False)
            process = _FORKS.Process(target=_work, args=(number, rank, meeting, sender, job, arguments), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            results[receiver] = None
        try:
            waiting = list(results)
            while waiting:
                ready = wait(waiting, PATIENCE_S)
                assert ready, "the workers are stuck"
                for receiver in ready:
                    error, results[receiver] = receiver.recv()
                    assert error is None, error
                    waiting.remove(receiver)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return list(results.values())


def _work(
    number: int, rank: int, meeting: str, sender: Connection, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if number > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=number)
        result = job(*arguments)
        if number > 1:
            dist.barrier()  # No worker leaves while another still needs it.
            dist.destroy_process_group()
        sender.send((None, result))
    except BaseException:
        sender.send((f"worker {rank}:\n{traceback.format_exc()}", None))
        raise
