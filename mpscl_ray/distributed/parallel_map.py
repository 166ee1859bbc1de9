"""The same function over many volumes, in Ray tasks or in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mpscl_ray.errors import ClusterError, MpsclError

Item = TypeVar("Item")
Result = TypeVar("Result")

_TASKS_PER_WORKER = 32
"""Number of tasks for each worker if there are far more items: tiny items are not worth a task each."""


def map_volumes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    name: Callable[[Item], str],
    done: Callable[[int], None],
    here: bool = False,
    keep: Callable[[Result], None] | None = None,
    lost: Callable[[Item, str], Result] | None = None,
) -> list[Result]:
    """Results of ``function`` for each item, in order.

    Args:
        function: what to do; importable by workers, its results small.
        items: one for each volume.
        workers: number of Ray tasks at a time (Ray must be connected); 0 runs in this process.
        name: what an item is called in an error.
        done: called with the number of finished items whenever it grows.
        here: whether tasks must stay on this node, because they write to its disk.
        keep: called in this process with each result as soon as it is there; every item is then a task of its own.
        lost: makes the result of an item whose worker died twice, from the reason; without it that is an error.

    Raises:
        MpsclError: the first that the function raised.
        ClusterError: a worker died, and there is no ``lost``.
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
    return _in_tasks(function, items, workers, name, done, here, keep, lost)


def _named(function: Callable[[Item], Result], item: Item, name: str) -> Result:
    try:
        return function(item)
    except Exception as error:
        error.add_note(f"while working on {name}")
        raise


def _batch(function: Callable[[Any], Any], items: Sequence[Any], names: Sequence[str]) -> list[Any] | MpsclError:
    """Body of a task. An MpsclError is returned, not raised: Ray would wrap it in its own traceback."""
    try:
        return [_named(function, item, name) for item, name in zip(items, names, strict=True)]
    except MpsclError as error:
        return error


def _in_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    name: Callable[[Item], str],
    done: Callable[[int], None],
    here: bool,
    keep: Callable[[Result], None] | None,
    lost: Callable[[Item, str], Result] | None,
) -> list[Result]:
    import ray  # only here: work in this process needs no Ray

    size = 1 if keep or lost else max(1, len(items) // (workers * _TASKS_PER_WORKER))
    starts = list(range(0, len(items), size))
    task = ray.remote(num_cpus=1, max_retries=1)(_batch)
    if here:
        task = task.options(label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()})
    results: dict[int, list[Result]] = {}
    running: dict[Any, int] = {}
    finished = 0
    waiting = iter(starts)
    try:
        while True:
            for start in waiting:
                batch = items[start : start + size]
                running[task.remote(function, batch, [name(item) for item in batch])] = start
                if len(running) >= 2 * workers:
                    break
            if not running:
                return [result for start in starts for result in results[start]]
            (ready,), _ = ray.wait(list(running), num_returns=1)
            start = running.pop(ready)
            names = ", ".join(name(item) for item in items[start : start + size][:3])
            result: list[Result] | MpsclError
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise RuntimeError(f"a defect while working on {names}: {error}") from error
            except ray.exceptions.RayError as error:
                reason = f"died ({type(error).__name__}), most often for lack of memory; give fewer --workers"
                if lost is None:
                    raise ClusterError(f"the worker that had {names} {reason}") from error
                result = [lost(items[start], f"its worker {reason}")]
            if isinstance(result, MpsclError):
                raise result
            results[start] = result
            if keep is not None:
                keep(result[0])
            finished += len(result)
            done(finished)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
