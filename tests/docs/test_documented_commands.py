"""Every command that README or docs tell is one that its program takes: the flags exist, the values are accepted.

Nothing is run here; tests/train/test_tutorial.py runs a page.
"""

import dataclasses
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from convert.command_line import Parser
from train.config import TrainConfig
from train.flags import parse_flags
from train.run.folder import write_config

_ROOT = Path(__file__).parents[2]
_PAGES = [_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "docs").glob("*.md"))]
_PAGES = [page for page in _PAGES if page.name != "fine-tuning.md"]  # that is run
_OURS = r"(?:python -m (?:train|convert|benchmarks)\b|crossvit )"
_MODULES = {name: f"{name}.__main__" for name in ("convert", "benchmarks.deploy", "train")}
# Bash expands the variables and loops of a block. Of the programs, those of this project are told, and none is started.
_TOLD = """
shopt -s extglob
told() { printf '%s\\n' "$@" >>told; echo >>told; }
python() { [[ "$1 $2" != "-m "@(train|convert|benchmarks)* ]] || told "${@:2}"; }
crossvit() { told train "$@"; }
command_not_found_handle() { :; }
"""


class _Taken(Exception):
    """The command line was accepted."""


def _told(texts: list[str], folder: Path) -> list[list[str]]:
    """Module and arguments of each command of this project in texts that a shell understands."""
    for text in texts:
        command = ["/bin/bash", "-c", _TOLD + text]
        subprocess.run(command, cwd=folder, env={"PATH": ""}, check=False, capture_output=True)
    told = folder / "told"
    groups = told.read_text().split("\n\n") if told.exists() else []
    return [[word for word in group.split("\n") if word != "..."] for group in groups if group]


def _blocks(page: Path) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def _in_sentences(page: Path) -> list[str]:
    """Commands with flags that are whole: a sentence about a flag may end with it, or with dots in place of a value."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(rf"`({_OURS}[^`]+)`", re.sub(r"\s+", " ", text))
    return [span for span in spans if re.search(r" --\S+ ", span) and not re.search(r"…|\.\.\.", span)]


def _refusal(module: str, argv: list[str], monkeypatch, capsys) -> str | None:
    """What a command says against its flags; None: nothing."""
    parse = Parser.parse_args

    def parse_only(parser, *args):
        parse(parser, *args)
        raise _Taken

    try:
        if module == "train.main" or (module == "train" and argv[0] == "train"):
            parse_flags(argv[module == "train" :])  # whose settings are checked together
            return None
        with monkeypatch.context() as patch:
            patch.setattr(Parser, "parse_args", parse_only)
            importlib.import_module(_MODULES.get(module, module)).main(argv)
    except _Taken:
        return None
    except SystemExit as stopped:
        if stopped.code == 0:  # --help
            return None
    return capsys.readouterr().err


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken(page, tmp_path, monkeypatch, capsys):
    blocks, spans = _blocks(page), _in_sentences(page)
    commands = _told(blocks + spans, tmp_path)
    lines = re.findall(rf"^\s*{_OURS}", "\n".join(blocks + spans), re.MULTILINE)
    assert len(commands) >= len(lines)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.pth.tar").touch()
    for name in ("NAME", "digits"):  # that are resumed
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_config(tmp_path / "runs" / name, {"train": dataclasses.asdict(TrainConfig())})
    refused = {}
    for module, *argv in commands:
        refusal = _refusal(module, argv, monkeypatch, capsys)
        if refusal is not None:
            refused[f"{module} {' '.join(argv)}"] = refusal
    assert refused == {}


def test_a_flag_that_there_is_not_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text('```sh\nMORE="--epochs 2"\npython -m train.main $MORE \\\n    --rate 1  # faster\n```\n')
    (command,) = _told(_blocks(page), tmp_path)
    assert command == ["train.main", "--epochs", "2", "--rate", "1"]
    assert "--rate" in _refusal(command[0], command[1:], monkeypatch, capsys)
