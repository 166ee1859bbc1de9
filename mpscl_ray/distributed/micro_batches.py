"""Gradient accumulation: networks see a batch in parts, losses see it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mpscl_ray.distributed.collectives import rank, world_size


class ImageRandom:
    """Random numbers for the images of a global batch, which a division of the batch does not change.

    All are drawn everywhere, and a micro-batch of a worker takes those of its images. ``generator`` is seeded alike on
    all workers.
    """

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device)
        self._index, self._number = 0, 1

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1) for images or features (B, ...), in that shape."""
        share = self._number * len(like)
        shape = (world_size() * share, *like.shape[1:])
        drawn = torch.rand(shape, generator=self.generator, device=like.device)
        return drawn[rank() * share :][:share][self._index :: self._number]

    @contextmanager
    def micro_batch(self, index: int, number: int, state: Tensor) -> Iterator[None]:
        """Draw for micro-batch ``index`` of ``number``; ``state`` is that of the generator before the whole batch."""
        self.generator.set_state(state)
        self._index, self._number = index, number
        try:
            yield
        finally:
            self._index, self._number = 0, 1


def in_micro_batches(
    run: Callable[..., Any],
    number: int,
    inputs: Sequence[Tensor],
    buffers: Iterable[Tensor] = (),
    random: ImageRandom | None = None,
) -> Any:
    """Output of a network for a whole batch that passes through it in ``number`` micro-batches of equal size.

    The forward pass keeps no activations. The backward pass runs one micro-batch after the other forward once more, so
    that the activations of one are in memory at a time. It is one backward pass, of the losses of the whole batch, and
    DistributedDataParallel averages the gradients once.

    Micro-batch i has the images i, i + number, i + 2 number... of each input. Where workers have consecutive shares of
    a global batch, these are together the images that one worker would have in it, and so are batch statistics.

    Args:
        run: takes inputs; gives a tensor, or (named) tuples of tensors and None, with the batch in front. It treats
            each image for itself; its batch statistics are those of a micro-batch.
        inputs: (B, ...) each, B a multiple of ``number``.
        buffers: what ``run`` updates in place, such as running statistics: once for each micro-batch, in order.
        random: what ``run`` draws from; None where it draws nothing.

    Source: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup" (GradCache).
    """
    if number == 1:
        return run(*inputs)
    drawn = random or ImageRandom(torch.device("cpu"))
    kept, state = list(buffers), drawn.generator.get_state()

    def run_one(index: int, *images: Tensor) -> Any:
        with drawn.micro_batch(index, number, state):
            return run(*images)

    parts = zip(*(x.reshape(-1, number, *x.shape[1:]).unbind(1) for x in inputs), strict=True)
    outputs = [
        checkpoint(
            run_one,
            index,
            *images,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _leaving_no_trace(kept, drawn.generator)),
        )
        for index, images in enumerate(parts)
    ]
    return _joined(outputs)


@contextmanager
def _leaving_no_trace(buffers: list[Tensor], generator: torch.Generator) -> Iterator[None]:
    """In the end, buffers and generator are as they were."""
    before = [buffer.clone() for buffer in buffers]
    state = generator.get_state()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(buffers, before)
        generator.set_state(state)


def _joined(outputs: Sequence[Any]) -> Any:
    """Output for the whole batch, in which the images of micro-batches alternate."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(list(outputs), dim=1).flatten(0, 1)
    fields = [_joined(field) for field in zip(*outputs, strict=True)]
    return tuple(fields) if type(first) is tuple else type(first)(*fields)
