"""One thread per worker: under `pytest -n`, several processes share the cores."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
