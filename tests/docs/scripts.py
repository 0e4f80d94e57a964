"""The scripts of docs/, which are in no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_DOCS = Path(__file__).parents[2] / "docs"


def load_script(name: str) -> ModuleType:
    """A script as a module; as where it is run, it finds what lies beside it."""
    spec = importlib.util.spec_from_file_location(name, _DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(_DOCS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(_DOCS))
    return module
