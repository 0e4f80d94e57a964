"""The benchmarks' tasks without warming up: for whole runs whose figures do not matter.

The processes of the sides import this module, so it imports no framework.
"""

import dataclasses
import pkgutil

from benchmarks.task import DataTask, DeployTask, EndToEndTask, Program, Task


class _Brief:
    def loader(self, side: str) -> str:
        return "tests.benchmarks.brief:load"


def load(task: _Brief, side: str) -> Program:
    program = pkgutil.resolve_name(super(_Brief, task).loader(side))(task, side)
    return dataclasses.replace(program, warm_up_s=0.0)


class BriefTask(_Brief, Task):
    pass


class BriefDataTask(_Brief, DataTask):
    pass


class BriefDeployTask(_Brief, DeployTask):
    pass


class BriefEndToEndTask(_Brief, EndToEndTask):
    pass
