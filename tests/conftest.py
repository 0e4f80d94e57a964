"""What holds under `pytest -n`, where several processes share the cores."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, and are not torn apart: they share fixtures.

    With `--dist worksteal` the short tests are then what is left to steal, and no worker is alone with a long one while
    the others have run out.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
