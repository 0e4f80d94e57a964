"""`python -m benchmarks.startup`: pairs of starts, and what is refused before the first of them."""

import json

import train.flags
from benchmarks import startup
from benchmarks.startup import main
from benchmarks.worker import SideFailed


def test_every_pair_begins_with_a_cache_of_its_own(monkeypatch, tmp_path, capsys):
    caches = []

    def seconds(flags, output, environment):
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        assert given["--workers"] == "3"
        assert (given["--recipe"], given["--augment-on"]) == ("imagenet", "device")
        train.flags.parse_flags(flags)  # which train.main understands
        caches.append(environment.get("JAX_COMPILATION_CACHE_DIR"))
        return float(len(caches))

    monkeypatch.setattr(startup, "_seconds", seconds)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    file = tmp_path / "x.json"
    flags = ["--workers", "3", "--recipe", "imagenet", "--augment-on", "device"]
    assert main([*flags, "--repeats", "2", "--json", str(file)]) == 0
    assert caches[0] is None  # the warm-up
    assert caches[1] == caches[2] != caches[3] == caches[4]
    (told,) = json.loads(file.read_text())["results"]
    assert {start: side["seconds"] for start, side in told["sides"].items()} == {
        "first": [2.0, 4.0],
        "second": [3.0, 5.0],
    }
    assert "| second | 4.0 (3.0-5.0) | 1.33 (1.25-1.50) |" in capsys.readouterr().out


def test_an_image_size_that_makes_no_model_is_one_line_and_status_2(capsys):
    assert main(["--image-size", "50"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_training_that_ends_before_its_first_step_is_one_line_and_status_1(monkeypatch, capsys):
    def fail(*_):
        raise SideFailed("train.main ended before its first step: no disk")

    monkeypatch.setattr(startup, "_seconds", fail)
    assert main([]) == 1
    assert (
        capsys.readouterr().err
        == "python -m benchmarks.startup: error: train.main ended before its first step: no disk\n"
    )
