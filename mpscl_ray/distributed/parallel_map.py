"""The same function over many volumes, in Ray tasks or in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

from mpscl_ray.distributed.places import TaskPlace
from mpscl_ray.errors import ClusterError, MpsclError

Item = TypeVar("Item")
Result = TypeVar("Result")

_TASKS_PER_WORKER = 32
"""Number of tasks for each worker if there are far more items: tiny items are not worth a task each."""

_LOOK_S = 2.0
"""Seconds between two looks at the nodes of the cluster."""


def map_volumes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | None,
    name: Callable[[Item], str],
    done: Callable[[int], None],
    here: bool = False,
    keep: Callable[[Result], None] | None = None,
    lost: Callable[[Item, str], Result] | None = None,
    place: TaskPlace | None = None,
) -> list[Result]:
    """Results of ``function`` for each item, in order.

    Args:
        function: what to do; importable by workers, its results small.
        items: one for each volume.
        workers: number of Ray tasks at a time (Ray must be connected); 0 runs in this process; None, which needs a
            ``place``, leaves it to the cluster.
        name: what an item is called in an error.
        done: called with the number of finished items whenever it grows.
        here: whether tasks must stay on this node, because they write to its disk.
        keep: called in this process with each result as soon as it is there; every item is then a task of its own.
        lost: makes the result of an item whose worker died, also when it was tried again, from the reason; without it
            that is an error.
        place: what each task reserves, spread over all nodes; every item is then a task of its own, and errors name
            item and node. None: a CPU.

    Raises:
        MpsclError: the first that the function raised.
        ClusterError: a worker died, and there is no ``lost``; or no node has the ``place``.
        Exception: any other error of the function, with the item's name as a note.
    """
    if workers == 0:
        results = []
        for item in items:
            results.append(_named(function, item, name(item)))
            if keep is not None:
                keep(results[-1])
            done(len(results))
        return results
    return _in_tasks(function, items, workers, name, done, here, keep, lost, place)


def _named(function: Callable[[Item], Result], item: Item, name: str) -> Result:
    try:
        return function(item)
    except Exception as error:
        error.add_note(f"while working on {name}")
        raise


def _batch(
    function: Callable[[Any], Any], items: Sequence[Any], names: Sequence[str], place: TaskPlace | None
) -> list[Any] | MpsclError:
    """Body of a task. An MpsclError is returned, not raised: Ray would wrap it in its own traceback."""
    if place is not None:
        import torch  # only here: other functions than those that predict do without

        torch.set_num_threads(place.threads)
    try:
        return [_named(function, item, name) for item, name in zip(items, names, strict=True)]
    except MpsclError as error:
        if place is None:
            return error
        import ray

        node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return type(error)(f"{names[0]} on node {node}: {error}")


def _task(here: bool, place: TaskPlace | None) -> Any:
    """:func:`_batch` as a Ray task."""
    import ray  # only here: work in this process needs no Ray

    task = ray.remote(num_cpus=1, max_retries=1)(_batch)
    if place is not None:
        return task.options(**place.task_options())
    if here:
        return task.options(label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()})
    return task


def _in_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None,
    name: Callable[[Item], str],
    done: Callable[[int], None],
    here: bool,
    keep: Callable[[Result], None] | None,
    lost: Callable[[Item, str], Result] | None,
    place: TaskPlace | None,
) -> list[Result]:
    import ray

    at_once, size = workers or len(items), 1
    if place is None:  # Ray has so many CPUs for them, and a task that waits saves time
        size = 1 if keep or lost else max(1, len(items) // (at_once * _TASKS_PER_WORKER))
        at_once *= 2
    starts = list(range(0, len(items), size))
    task, look = _task(here, place), place.watch() if place else lambda: None
    results: dict[int, list[Result]] = {}
    running: dict[Any, int] = {}
    finished = 0
    waiting = iter(starts)
    try:
        while True:
            for start in islice(waiting, at_once - len(running)):
                batch = items[start : start + size]
                running[task.remote(function, batch, [name(item) for item in batch], place)] = start
            if not running:
                return [result for start in starts for result in results[start]]
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_S)
            if not ready:
                look()
                continue
            start = running.pop(ready[0])
            result = _result(ready[0], items[start : start + size], name, lost, place)
            results[start] = result
            if keep is not None:
                keep(result[0])
            finished += len(result)
            done(finished)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _result(
    reference: Any,
    items: Sequence[Item],
    name: Callable[[Item], str],
    lost: Callable[[Item, str], Result] | None,
    place: TaskPlace | None,
) -> list[Result]:
    """Results of a task that has ended; raises what :func:`map_volumes` says."""
    import ray

    names = ", ".join(name(item) for item in items[:3])
    try:
        result: list[Result] | MpsclError = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"a defect while working on {names}: {error}") from error
    except ray.exceptions.RayError as error:
        reason = f"died ({type(error).__name__}), most often for lack of memory"
        reason += "; give fewer --workers" if place is None else " on its node, or with its node"
        if lost is None:
            raise ClusterError(f"the worker that had {names} {reason}") from error
        return [lost(items[0], f"its worker {reason}")]
    if isinstance(result, MpsclError):
        raise result
    return result
