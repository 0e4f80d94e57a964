"""Results come late and in order, and batches do not wait for them."""

import weakref

import numpy as np

from train.inference.model import BATCHES_BEHIND, forward


class _Batch(dict):
    """A batch of which can be told whether anybody still has it."""


def test_results_are_fetched_late_and_no_batch_is_kept_for_them():
    made, alive_at_most = [], 0

    def batches():
        for number in range(6):
            batch = _Batch(number=np.array(number))
            made.append(weakref.ref(batch))
            yield batch
            del batch

    def program(batch):
        return {"square": batch["number"] ** 2}

    got = []
    for outputs in forward(program, batches()):
        if not got:
            assert len(made) == 1 + BATCHES_BEHIND
        got.append(int(outputs["square"]))
        alive_at_most = max(alive_at_most, sum(batch() is not None for batch in made))
    assert got == [number**2 for number in range(6)]
    assert alive_at_most == 1  # that which the generator holds
