# ruff: noqa: F401
"""What a run imports; nothing of it starts threads or touches a device, so that processes can be forked after it."""

import matplotlib.backends.backend_agg
import matplotlib.figure
import orbax.checkpoint
import tensorboardX
import timm.data
import torch

import train.loop
import train.optim.programs
