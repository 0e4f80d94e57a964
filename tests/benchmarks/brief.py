"""The end-to-end task on a small model and without warming up: for a whole run whose figures do not matter.

The processes of the sides import this module, so it imports no framework.
"""

import dataclasses

from benchmarks import worker
from benchmarks.sides import peak
from benchmarks.task import EndToEndTask, Program
from crossvit_jax.config import VARIANTS
from tests.small_model import small_config

CLASSES = 1000


class BriefEndToEndTask(EndToEndTask):
    def loader(self, side: str) -> str:
        return "tests.benchmarks.brief:load"


def load(task: BriefEndToEndTask, side: str) -> Program:
    worker.ROUND_SECONDS = peak._SECONDS = 0.1  # of the side's process, as what follows
    VARIANTS["ti"] = small_config(CLASSES).replace(name="ti")
    if side.startswith("timm"):
        from benchmarks.sides import timm
        from tests.train.small_weights import small_timm_model

        timm._model = lambda task: small_timm_model(CLASSES)
    real = EndToEndTask(**{field.name: getattr(task, field.name) for field in dataclasses.fields(task)})
    return dataclasses.replace(worker.load_program(real, side), warm_up_s=0.0)
