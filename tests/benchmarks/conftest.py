"""Sides in the process of the tests: whole runs whose figures do not matter, without the imports of each process."""

import jax
import pytest

from benchmarks import rounds
from benchmarks.worker import Ready, load_program


class HereWorker:
    """A side that loads and checks as a worker does, and times nothing."""

    def __init__(self, side, task, environment):
        self.side, self.task = side, task

    def close(self):
        pass

    @property
    def ready(self):
        program = load_program(self.task, self.side)
        checked = program.check()
        program.run(1)
        flops = program.flops and program.flops()
        told = {"load_s": 0.0, "first_result_s": 0.0, "calls_per_round": 1}
        return Ready(checked, program.facts, told, flops, program.peak_flops and program.peak_flops())

    def round(self):
        return 0.5 if self.side.startswith("t") else 0.25


@pytest.fixture
def here(monkeypatch):
    """Whoever measures does so here."""
    monkeypatch.setattr(rounds, "Worker", HereWorker)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("benchmarks.sides.peak._SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.sides.flax.set_up", lambda task: None)
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)
