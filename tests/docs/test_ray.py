"""The applications for Ray that docs/serving has, where Ray is installed; it is none of what the tests need."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.train.inference.server.conftest import encoded
from tests.train.small_weights import save_small
from train.predict import main as predict_main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[data,serve]'"
    ),
]
_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(save_small(tmp_path_factory.mktemp("ray") / "w.safetensors", "abcdefgh"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded((60 + 7 * number, 50), seed=number))
    return paths


def _predicted(capsys, weights, pictures):
    capsys.readouterr()
    assert predict_main([f"--weights={weights}", "--precision=float32", "--format=jsonl", *map(str, pictures)]) == 0
    return [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]


def _same(told, expected):
    assert [one["index"] for one in told] == [one["index"] for one in expected]
    for one, other in zip(told, expected, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_ray_data_classifies_a_list_and_goes_on_where_it_ended(weights, pictures, tmp_path, capsys):
    broken, out = tmp_path / "broken.jpg", tmp_path / "out"
    broken.write_bytes(b"\xff\xd8\xffnoise")
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in [*pictures[:3], broken, *pictures[3:]]))
    script = (_ROOT / "docs" / "serving" / "ray_data.py").read_text()
    program = tmp_path / "ray_data.py"
    program.write_text(script.replace("PICTURES_PER_FILE, BATCH = 1000, 32", "PICTURES_PER_FILE, BATCH = 4, 2"))
    assert "= 4, 2" in program.read_text()

    def run():
        command = [sys.executable, str(program), weights, str(tmp_path / "list"), str(out)]
        done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "0 of 2 files are there" in run()
    files = sorted(out.iterdir())
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [row["path"] for row in rows] == (tmp_path / "list").read_text().splitlines()
    assert "error" in rows[3]
    for row, expected in zip(rows[:3] + rows[4:], _predicted(capsys, weights, pictures), strict=True):
        _same(row["predictions"], expected)
    files[1].unlink()
    files[0].write_text("kept\n")
    assert "1 of 2 files are there" in run()
    assert sorted(out.iterdir()) == files
    assert files[0].read_text() == "kept\n"
    assert "2 of 2 files are there" in run()


def test_ray_serve_answers_as_the_command(weights, pictures, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "docs/serving/ray_serve.py", weights, str(port)]
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(command, cwd=_ROOT, env=_ENVIRONMENT, stdout=out, stderr=out) as process,
    ):
        try:
            expected = _predicted(capsys, weights, pictures)
            end = time.monotonic() + 300
            while (first := _ask(port, pictures[0].read_bytes()))[0] not in (200, 422) and time.monotonic() < end:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
            _same(first[1]["predictions"], expected[0])
            for path, one in zip(pictures[1:], expected[1:], strict=True):
                _same(_ask(port, path.read_bytes())[1]["predictions"], one)
            status, told = _ask(port, b"noise")
            assert (status, "the picture" in told["error"]) == (422, True)
        finally:
            process.terminate()


def _ask(port, content):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", content, {"Content-Type": "image/png"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else {}
    except OSError:
        return 0, {}
