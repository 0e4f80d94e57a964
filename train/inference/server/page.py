"""The page for people, and the description for programs: files that lie beside this one."""

import base64
import hashlib
import html
import re
from functools import cache
from importlib.resources import files

from train.inference.server.engine import Engine


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def openapi() -> str:
    """The description of the routes, as OpenAPI has it."""
    return _file("openapi.json")


def page(engine: Engine) -> tuple[str, dict[str, str]]:
    """The page, and its headers: it runs its own script and style, and loads nothing from anywhere else."""
    text = _file("page.html").replace("HEADLINE", html.escape(engine.headline))
    text = text.replace('data-attention=""', f'data-attention="{str(engine.explains).lower()}"')
    allowed = " ".join(f"{kind}-src {_hash(text, kind)};" for kind in ("script", "style"))
    policy = f"default-src 'none'; {allowed} img-src data: blob:; connect-src 'self'; form-action 'none'"
    return text, {"Content-Security-Policy": policy + "; frame-ancestors 'none'", "Referrer-Policy": "no-referrer"}


def _hash(text: str, tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
