"""Sides in the process of the tests: whole runs whose figures do not matter, without the imports of each process."""

import dataclasses
import functools

import jax
import pytest

from benchmarks import rounds, worker


class HereWorker:
    """A side that does what its process would, once, in this one; the times that it tells are made up."""

    def __init__(self, side, task, environment):
        self.side, self.task = side, task
        self._orders, self._answers = ["round", "leave"], []

    def close(self):
        pass

    @functools.cached_property
    def ready(self):
        worker._take_turns(self.side, self.task, self)
        ready, seconds = self._answers
        assert seconds > 0
        return ready

    def round(self):
        return 0.5 if self.side.startswith("t") else 0.25

    def recv(self):
        return self._orders.pop(0)

    def send(self, answer):
        self._answers.append(answer)


@pytest.fixture
def here(monkeypatch):
    """Whoever measures does so here."""
    load_program = worker.load_program
    monkeypatch.setattr(rounds, "Worker", HereWorker)
    monkeypatch.setattr(worker, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(worker, "load_program", lambda *side: dataclasses.replace(load_program(*side), warm_up_s=0.0))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("benchmarks.sides.peak._SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.sides.flax.set_up", lambda task: None)
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)
