"""A detector learns: what is compiled, drawn, assigned, trained and scored fits together."""

import json
import os
import subprocess
import sys

import pytest

from tests import compilation

_TRAIN = """
import sys
from crossvit_jax.config import VARIANTS
from train import loop, main

VARIANTS["ti"] = VARIANTS["ti"].replace(embed_dim=(48, 96), depth=(1, 2), num_heads=(3, 3), stages=1)
loop.draw_curves = lambda *_: None  # it takes seconds
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_small_detector_finds_digits_in_scenes_that_it_has_not_seen(tmp_path):
    flags = ["--task=detection", "--epochs=2", "--eval-every=2", "--batch-size=16", "--lr=2e-3"]
    environment = {**os.environ, "XLA_FLAGS": compilation.xla_flags(compilation.AS_FOR_USERS)}
    command = [sys.executable, "-c", _TRAIN, *flags, f"--output={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/ap50"] > 0.3
    assert f"AP50 {last['eval/ap50']:.2f}" in done.stdout
