"""The benchmarks' tasks without warming up: for whole runs whose figures do not matter.

The processes of the sides import this module, so it imports no framework.
"""

import dataclasses

from benchmarks.data_task import DataTask
from benchmarks.deploy_task import DeployTask
from benchmarks.end_to_end_task import EndToEndTask
from benchmarks.task import Program, Task


class _Brief:
    def load(self, side: str) -> Program:
        return dataclasses.replace(super().load(side), warm_up_s=0.0)


class BriefTask(_Brief, Task):
    pass


class BriefDataTask(_Brief, DataTask):
    pass


class BriefDeployTask(_Brief, DeployTask):
    pass


class BriefEndToEndTask(_Brief, EndToEndTask):
    pass
