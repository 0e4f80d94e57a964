"""Detectors and segmenters learn: what is compiled, drawn, assigned, trained and scored fits together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compilation

_TRAIN = """
import json, sys
from crossvit_jax.config import VARIANTS
from train import loop, main

model = {name: tuple(value) for name, value in json.loads(sys.argv[1]).items()}
VARIANTS["ti"] = VARIANTS["ti"].replace(embed_dim=(48, 96), num_heads=(3, 3), stages=1, **model)
loop.draw_curves = lambda *_: None  # it takes seconds
sys.exit(main.main(sys.argv[2:]))
"""


def _trained(folder: Path, model: dict, *flags: str) -> tuple[dict[str, float], str]:
    """The last line of the log, and what was printed, of a run of a small model on the embedded scenes."""
    environment = {**os.environ, "XLA_FLAGS": compilation.xla_flags(compilation.AS_FOR_USERS)}
    command = [sys.executable, "-c", _TRAIN, json.dumps(model), *flags, "--batch-size=16", f"--output={folder / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_a_small_detector_finds_digits_in_scenes_that_it_has_not_seen(tmp_path):
    flags = ["--task=detection", "--width=32", "--epochs=2", "--eval-every=2", "--lr=4e-3", "--workers=0"]
    last, printed = _trained(tmp_path, {"depth": (1, 2)}, *flags)
    assert last["eval/ap50"] > 0.3
    assert f"AP50 {last['eval/ap50']:.2f}" in printed


@pytest.mark.slow
def test_a_small_segmenter_tells_digits_apart_in_scenes_that_it_has_not_seen(tmp_path):
    """At half the size, in patches of half the size: as many patches, of a quarter of the pixels."""
    flags = ["--task=segmentation", "--image-size=48", "--width=32", "--epochs=4", "--eval-every=4"]
    flags += ["--lr=3e-3", "--lr-batch-size=16", "--warmup-epochs=1", "--workers=0"]
    last, printed = _trained(tmp_path, {"depth": (1, 3), "patch_size": (6, 8)}, *flags)
    assert last["eval/miou"] > 0.2
    assert f"mIoU {last['eval/miou']:.2f}" in printed
