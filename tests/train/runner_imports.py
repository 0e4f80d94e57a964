"""What a run imports; nothing of it starts threads or touches a device, so that processes can be forked after it."""

import timm.data  # noqa: F401
import torch  # noqa: F401

import train.bad_images
import train.checkpoints
import train.job
import train.loop
import train.main
import train.resample  # noqa: F401
