"""What a run imports; nothing of it starts threads or touches a device, so that processes can be forked after it."""

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import tensorboardX  # noqa: F401
import timm.data  # noqa: F401
import torch  # noqa: F401
