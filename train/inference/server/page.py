"""The page for people and what it draws, and the description for programs. Page and description are files here."""

import base64
import hashlib
import html
import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from crossvit_jax import CrossViTConfig
from train.inference.server.engines.engine import Engine, Explained
from train.pictures.attention import seen_region
from train.pictures.dense import png_of


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def openapi() -> str:
    """The description of the routes, as OpenAPI has it."""
    return _file("openapi.json")


def page(engine: Engine) -> tuple[str, dict[str, str]]:
    """The page, and its headers: it runs its own script and style, and loads nothing from anywhere else."""
    text = _file("page.html").replace("HEADLINE", html.escape(engine.headline))
    query = "top_k=5" if engine.config.task == "classification" else "overlay=true"
    query += "&amp;attention=true" if engine.explains else ""
    text = text.replace('data-query=""', f'data-query="{query}"')
    allowed = " ".join(f"{kind}-src {_hash(text, kind)};" for kind in ("script", "style"))
    policy = f"default-src 'none'; {allowed} img-src data: blob:; connect-src 'self'; form-action 'none'"
    return text, {"Content-Security-Policy": policy + "; frame-ancestors 'none'", "Referrer-Policy": "no-referrer"}


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
    picture = base64.b64encode(png_of(Image.fromarray(image))).decode()
    return {"picture": picture, "size": list(config.image_size), "maps": maps}


def _hash(text: str, tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
