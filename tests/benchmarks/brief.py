"""The benchmarks' tasks on a small model and without warming up: for whole runs whose figures do not matter.

The processes of the sides import this module, so it imports no framework.
"""

import dataclasses
import pkgutil

from benchmarks import worker
from benchmarks.sides import peak
from benchmarks.task import DataTask, DeployTask, EndToEndTask, ModelTask, Program
from crossvit_jax.config import VARIANTS
from tests.small_model import small_config

CLASSES = 1000


class _Brief:
    def loader(self, side: str) -> str:
        return "tests.benchmarks.brief:load"


def load(task: _Brief, side: str) -> Program:
    worker.ROUND_SECONDS = peak._SECONDS = 0.1  # of the side's process, as what follows
    if not isinstance(task, DataTask):  # which has no model
        VARIANTS["ti"] = small_config(CLASSES).replace(name="ti")
        if side.startswith("timm"):
            from benchmarks.sides import timm
            from tests.train.small_weights import small_timm_model

            timm._model = lambda task: small_timm_model(CLASSES)
    program = pkgutil.resolve_name(super(_Brief, task).loader(side))(task, side)
    return dataclasses.replace(program, warm_up_s=0.0)


class BriefModelTask(_Brief, ModelTask):
    pass


class BriefDataTask(_Brief, DataTask):
    pass


class BriefDeployTask(_Brief, DeployTask):
    pass


class BriefEndToEndTask(_Brief, EndToEndTask):
    pass
