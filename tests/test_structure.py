"""How the code is laid out: who imports whom, how wide packages and how long functions are, what is in the wheel."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from crossvit_jax.extras import EXTRAS

_ROOT = Path(__file__).parents[1]

# packages, and what each may import of the others: whole packages or single modules
_ARROWS = {
    "crossvit_jax": (),
    "crossvit_torch": ("crossvit_jax.config",),
    "convert": ("crossvit_jax", "crossvit_torch"),
    "train": ("crossvit_jax", "convert"),
    "benchmarks": ("crossvit_jax", "crossvit_torch", "convert", "train"),
}

# the parts of train, lowest first: none imports a higher one, and the commands do not import each other
_LAYERS = ["config", "recipes", "pictures", "devices", "run", "images", "data", "tasks"]
_LAYERS += ["optim", "inference", "cost", "flags", "job", "loop"]
_COMMANDS = ["main", "evaluate", "predict", "serve", "compile", "__main__"]

_INSTALLED = set(_ARROWS) - {"benchmarks"}

_WIDEST_PACKAGE, _WIDEST_FOLDER = 20, 12  # entries
_LONGEST_FUNCTION = 99  # lines


def _module(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_FILES = {_module(path): path for package in _ARROWS for path in sorted((_ROOT / package).rglob("*.py"))}
_INSTALLED_MODULES = [module for module in _FILES if module.split(".")[0] in _INSTALLED]
_TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in _FILES.items()}


def _statements(tree: ast.AST):
    """All nodes, those inside functions too, but not those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node)


def _imports(module: str) -> set[str]:
    """The modules of the project that a module imports. `from package import module` is an import of the latter."""
    found = set()
    for node in _statements(_TREES[module]):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports with dots"
            inside = [f"{node.module}.{name.name}" for name in node.names]
            found.update(name if name in _FILES else node.module for name in inside)
    return found & set(_FILES)


_IMPORTS = {(module, imported) for module in _FILES for imported in _imports(module)}


@cache
def _defined(module: str) -> set[str]:
    """The names that can be imported from a module: those at its top, and the modules in a package."""
    names = {other.removeprefix(f"{module}.") for other in _FILES}
    nodes = list(_TREES[module].body)
    for node in nodes:  # which grows
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names.update(ast.literal_eval(node.value))  # some of it comes from a __getattr__
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(name.asname or name.name for name in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            nodes.extend(ast.iter_child_nodes(node))
    return names


def test_what_is_imported_inside_functions_exists_too():
    missing = {
        f"{module} imports {name.name} from {node.module}"
        for module, tree in _TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in _FILES
        for name in node.names
        if name.name not in _defined(node.module)
    }
    assert missing == set()


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set() for module in _FILES}
    for module, imported in _IMPORTS:
        graph[module].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_packages_import_only_those_below_them():
    def allowed(package, imported):
        return any(imported == known or imported.startswith(f"{known}.") for known in (package, *_ARROWS[package]))

    against = {(module, other) for module, other in _IMPORTS if not allowed(module.split(".")[0], other)}
    assert against == set()


def test_the_parts_of_train_import_only_those_below_them():
    heights = {name: height for height, name in enumerate(_LAYERS)} | dict.fromkeys(_COMMANDS, len(_LAYERS))
    modules = {module: module.split(".")[1] for module in _FILES if module.startswith("train.")}
    assert set(modules.values()) <= set(heights)  # a new part has to be given its place here

    def climbs(module, other):
        return heights[modules[other]] > heights[modules[module]] or (modules[other] in _COMMANDS)

    against = {(a, b) for a, b in _IMPORTS if a in modules and b in modules and climbs(a, b)}
    assert against == set()


def test_packages_and_folders_have_few_entries():
    wide = set()
    for package in {path.parent for path in _FILES.values()}:
        entries = {
            path for path in package.iterdir() if not path.name.startswith(("_", ".")) and path.suffix in (".py", "")
        }
        if len(entries) > (_WIDEST_PACKAGE if package.parent == _ROOT else _WIDEST_FOLDER):
            wide.add(".".join(package.relative_to(_ROOT).parts))
    assert wide == set()


def test_no_function_is_long():
    long = {
        f"{module}.{node.name}"
        for module, tree in _TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= _LONGEST_FUNCTION
    }
    assert long == set()


# --- the wheel ---

# imports every module, from the folder and nowhere else; those that need an extra that is missing are skipped
_IMPORT_ALL = """
import importlib, sys
folder, *modules = sys.argv[1:]
packages = {name.partition(".")[0] for name in modules}
for name in modules:
    try:
        file = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in packages:
            raise
    else:
        assert file.startswith(folder), f"{name} comes from {file}"
"""


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    """A folder with what an installation would have, built from a copy so that nothing is left in the source tree."""
    source, built, unpacked = (tmp_path_factory.mktemp(name) for name in ("source", "built", "unpacked"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, source)
    for package in _INSTALLED:
        shutil.copytree(_ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_the_wheel_has_every_module(unpacked_wheel):
    shipped = {str(path.relative_to(unpacked_wheel)) for path in unpacked_wheel.rglob("*.py")}
    assert shipped == {str(_FILES[module].relative_to(_ROOT)) for module in _INSTALLED_MODULES}
    assert {str(path.parent.relative_to(unpacked_wheel)) for path in unpacked_wheel.rglob("py.typed")} == _INSTALLED


@pytest.mark.slow
def test_every_module_of_the_wheel_can_be_imported(unpacked_wheel):
    environment = os.environ | {
        "PYTHONPATH": str(unpacked_wheel),
        "JAX_PLATFORMS": "cpu",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", _IMPORT_ALL, str(unpacked_wheel), *_INSTALLED_MODULES]
    done = subprocess.run(command, cwd=unpacked_wheel, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_extra_brings_what_is_imported_of_it():
    """What names an extra to whoever misses a package, and what the extra asks for, are the same."""
    asked = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.match(r"[\w-]+", line)[0] for line in lines} for extra, lines in asked.items()}
    for extra, packages in EXTRAS.items():
        assert set(packages.values()) <= names[extra], extra
        of_others = {"crossvit-jax", "scikit-learn", "pillow"}  # which several extras want
        assert names[extra] <= set(packages.values()) | of_others, extra


def test_every_link_of_the_pages_leads_to_a_file():
    pages = [*_ROOT.glob("*.md"), *(_ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
