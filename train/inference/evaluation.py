"""The one way through which images go that are not trained on: held-out images, and those to evaluate or to predict."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

BATCHES_BEHIND = 2  # results are fetched so many batches late, so that the devices never wait for the host

Batch = dict[str, Any]


def forward(program: Callable[[Batch], Any], batches: Iterator[Batch]) -> Iterator[tuple[Batch, Any]]:
    """Every batch with what a program makes of it, as numpy arrays, in their order.

    Args:
        program: a compiled function of a batch.
    """
    pending: deque[tuple[Batch, Any]] = deque()
    for batch in batches:
        pending.append((batch, program(batch)))
        if len(pending) > BATCHES_BEHIND:
            done, outputs = pending.popleft()
            yield done, jax.device_get(outputs)
    while pending:
        done, outputs = pending.popleft()
        yield done, jax.device_get(outputs)
