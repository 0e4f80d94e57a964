"""What makes a round of a side with an input pipeline start as it ends, and end in peace."""

import contextlib
import time
from collections.abc import Callable, Iterator

from benchmarks.cpu_time import children_seconds

_LOOK_EVERY = 0.5  # seconds
_AT_REST = 0.1  # cores; workers that wait for room in a queue look up now and then
_PATIENCE = 60.0  # seconds


@contextlib.contextmanager
def steady_state(
    take: Callable[[], object], train: Callable[[int], None], *, ahead: int, workers: int
) -> Iterator[None]:
    """Surrounds a round: before it, no batch lies ready.

    Between its rounds a pipeline fills its queues, and a round that began with them would be one of a faster pipeline.
    So all that can lie ready is thrown away, and each worker delivers one batch that is trained on: the queues are then
    as they are in the middle of a long run, empty where the workers are slower than the step.

    Args:
        take: takes a batch from the pipeline.
        train: so many steps, each on a new batch.
        ahead: at least as many batches as can lie ready.
        workers: processes of the pipeline.
    """
    for _ in range(ahead):
        take()
    train(workers)
    yield


def wait_for_rest() -> None:
    """Returns when the children of this process do not compute any more, after a minute at the latest.

    Workers that fill their queues after a round would take the cores from the side whose turn is next.
    """
    end = time.perf_counter() + _PATIENCE
    before, working = children_seconds(), True
    while working and time.perf_counter() < end:
        time.sleep(_LOOK_EVERY)
        now = children_seconds()
        before, working = now, now - before > _AT_REST * _LOOK_EVERY
