"""What a run tells of the code that it was made with."""

import shlex
import subprocess
import sys

from train.run import provenance


def _git(folder, *command):
    subprocess.run(["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x", *command], check=True)


def test_the_commit_is_told_only_of_a_repository_that_has_this_code(tmp_path, monkeypatch):
    file = tmp_path / "provenance.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "_FILE", file)
    assert provenance.commit() is None
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-qm", "empty", "--allow-empty")
    assert provenance.commit() is None  # as in a folder of installed packages inside a project of one's own
    _git(tmp_path, "add", "provenance.py")
    _git(tmp_path, "commit", "-qm", "code")
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert provenance.commit() == head[:12]
    file.write_text("x = 2\n")
    assert provenance.commit() == f"{head[:12]}-dirty"


def test_the_command_line_is_what_a_shell_would_read(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train.main", "--dataset", "folder:my photos"])
    assert shlex.split(provenance.command_line()) == sys.orig_argv
