"""The command: its flags, and a process that a signal ends in good order."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.command_line import refusal
from tests.train.inference.server.conftest import encoded
from tests.train.small_weights import save_small
from train.inference.server.page import openapi
from train.serve import _parser, main

_ROOT = Path(__file__).parents[2]
_PROGRAM = "python -m train.serve"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--port=65536", "from 0 to 65535"),
        ("--port=x", "a whole number"),
        ("--max-batch=0", "1 or more"),
        ("--batching-delay=-1", "milliseconds"),
        ("--deadline=0", "seconds, above 0"),
        ("--grace=inf", "seconds, above 0"),
        ("--max-pixels=0", "1 or more"),
        ("--overload-status=500", "503, 429"),
        ("--batch-size=4", "unrecognized"),
    ],
)
def test_a_wrong_flag_is_told(capsys, flag, words):
    assert words in refusal(capsys, _PROGRAM, main, "--weights=w", flag)


def test_what_keeps_it_from_starting_is_told_in_a_line(capsys, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refusal(capsys, _PROGRAM, main, "--weights=w", f"--port={port}")
        assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in told
    assert "cannot listen at 192.0.2.1:0" in refusal(
        capsys, _PROGRAM, main, "--weights=w", "--port=0", "--host=192.0.2.1"
    )
    missing = tmp_path / "missing.safetensors"
    assert "missing.safetensors" in refusal(capsys, _PROGRAM, main, f"--weights={missing}", "--port=0")
    for token in ("", " a", "ä", "a\n"):
        monkeypatch.setenv("CROSSVIT_TOKEN", token)
        assert "CROSSVIT_TOKEN is set, and is no token" in refusal(capsys, _PROGRAM, main, "--weights=w", "--port=0")


def test_the_manifest_and_the_image_start_it_with_flags_and_probes_that_there_are():
    folder = _ROOT / "docs" / "serving"
    deployment, service = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    python, module, name, *flags = json.loads(entry)
    assert [python, module, name] == _PROGRAM.split()
    args = _parser().parse_args([*flags, *container["args"]])
    (port,) = container["ports"]
    assert (args.host, args.port) == ("0.0.0.0", port["containerPort"])
    described = json.loads(openapi())["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in described
        assert container[probe]["httpGet"]["port"] == port["name"]
    # what the linters of .ci/run ask for, and what they do not
    assert pod["securityContext"]["runAsNonRoot"]
    (user,) = re.findall(r"^USER (\d+)$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    assert int(user) == pod["securityContext"]["runAsUser"] > 0
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + args.grace
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    copied = re.findall(r"^COPY (\w+) \1$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) == {path.parent.name for path in _ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}


class _Process:
    """The command in a process of its own, and what it says."""

    def __init__(self, *flags, until=": ready\n"):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train.serve", "--port=0", *flags],
            cwd=_ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said, self._until = [], until
        self._ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._ready.wait(300), self.said
        (start,) = (line for line in self.said if "http://" in line)
        self.address = start.split("http://")[1].split()[0]

    def _listen(self):
        for line in self.process.stderr:
            self.said.append(line)
            if self._until in line:
                self._ready.set()
        self._ready.set()

    def ask(self, path, content=None):
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", content, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def server(tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abcdefgh")
    server = _Process(f"--weights={weights}", "--max-batch=2", "--queue=64", "--batching-delay=300", "--grace=60")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_ends_well(server):
    picture = encoded()
    assert server.ask("/readyz") == (200, {"status": "ready"})

    def ask(_):
        try:
            return server.ask("/predict", picture)
        except OSError:  # it does not listen any more
            return None

    with ThreadPoolExecutor(9) as pool:
        accepted = [pool.submit(ask, number) for number in range(9)]
        held = 0
        while held < 9 and not all(one.done() for one in accepted):
            held = _held(server)
            if held >= 5:
                break
        server.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in accepted]
    assert server.process.wait(60) == 0
    assert any("SIGTERM: ending" in line for line in server.said)
    statuses = [None if answer is None else answer[0] for answer in answers]
    assert statuses.count(200) >= held  # what it held is answered; others came too late
    assert set(statuses) <= {200, 503, None}
    log = [json.loads(line) for line in server.process.stdout]
    predictions = [entry for entry in log if entry["path"] == "/predict"]
    assert sum(entry["status"] == 200 for entry in predictions) == statuses.count(200)  # and none of them was lost


@pytest.mark.slow
def test_sigterm_ends_it_while_it_compiles(tmp_path, monkeypatch):
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(_COMPILES_FOREVER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{_ROOT}")
    weights = save_small(tmp_path / "w.safetensors", "abcdefgh")
    server = _Process(f"--weights={weights}", until="http://")
    try:
        while server.ask("/readyz") != (503, {"status": "starting"}):
            pass
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    finally:
        server.process.kill()
        server.process.wait()


# as XLA does for large models, in a thread that nobody can end
_COMPILES_FOREVER = """
import importlib.abc, sys, time
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "train.inference.server.run":
            sys.meta_path.remove(self)
            from train.inference.server.engines.jax_engine import JaxEngine
            JaxEngine.compile = lambda self: time.sleep(600)
sys.meta_path.insert(0, Finder())
"""


def _held(server):
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return int(float(text.split("\ncrossvit_held_pictures ")[1].split()[0]))
