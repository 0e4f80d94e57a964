"""What a picture's class tokens attend to, as JSON for the page."""

import base64
from typing import Any

import numpy as np

from crossvit_jax import CrossViTConfig
from train.inference.server.engine import Explained
from train.inference.server.pictures import png
from train.pictures.attention import seen_region


def told_attention(config: CrossViTConfig, image: np.ndarray, explained: Explained) -> dict[str, Any]:
    """The picture as the model saw it, a PNG in base64, and two maps for each branch.

    A map is that of a `branch`'s class token, over the patches of the branch `over`: its own, in self-attention, or the
    next one's, in the fusion. `values` has the share of each patch of the `grid` (rows, columns), row by row, and
    `token` that of the token itself; together they are 1. `region` is the part of the picture that the patches cover:
    left, top, width and height in pixels.
    """
    maps = []
    for branch in range(len(config.branches)):
        for kind, over in (("own", branch), ("across", (branch + 1) % len(config.branches))):
            values = explained.attention[kind][branch]
            left, right, bottom, top = seen_region(config, over)
            maps.append(
                {
                    "branch": branch,
                    "kind": kind,
                    "over": over,
                    "patch_size": config.patch_size[over],
                    "grid": list(config.grid_size[over]),
                    "region": [left + 0.5, top + 0.5, right - left, bottom - top],
                    "token": float(values[0]),
                    "values": values[1:].tolist(),
                }
            )
    return {"picture": base64.b64encode(png(image)).decode(), "size": list(config.image_size), "maps": maps}
