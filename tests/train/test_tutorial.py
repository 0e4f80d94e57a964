"""The page docs/fine-tuning.md does what it says, and the main job that it begins with learns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from crossvit_jax.preprocess import normalised
from tests import compilation
from train.data.datasets import open_digits
from train.images.transforms import eval_transform
from train.recipes import RECIPES

_PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"


@pytest.mark.slow
def test_every_block_of_the_tutorial_works_and_timm_and_bfloat16_score_its_digits_the_same(digits_dir, tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_PAGE.parents[1]),
        "TFDS_DATA_DIR": digits_dir,
        "XLA_FLAGS": compilation.xla_flags(compilation.AS_FOR_USERS),
    }
    page = _PAGE.read_text()
    assert page.count("--epochs 1 ") == 1
    page = page.replace("--epochs 1 ", "--epochs 6 ")  # after which it must have learned
    outputs = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL):
        command = {"sh": ["bash", "-e", "-c", block], "python": [sys.executable, "-c", block]}[language]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout + done.stderr)
    pictures, checkpoint, interrupted, resumed, evaluated, predicted, converted, loaded = outputs
    assert pictures == ""
    assert "note: new head for 2 classes instead of 10" in interrupted
    assert "ended with status 143" in interrupted
    assert "continued after step" in resumed
    top1 = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["top1"]
    told = float(re.search(r"\(best top-1 ([\d.]+) %", resumed)[1])
    assert top1 == pytest.approx(told, abs=0.01)
    assert top1 > 60
    assert "even" in evaluated
    assert "odd" in predicted
    drawn = {str(path.relative_to(tmp_path / "maps")) for path in tmp_path.glob("maps/*/*")}
    assert drawn == {"odd/1.png", "even/0.png"}
    assert "bit for bit" in converted
    assert loaded == "loaded into timm\n"

    top1 = _learned(tmp_path / "runs" / "digits", checkpoint)
    right = _right_in_timm(tmp_path / "digits.pth", digits_dir)
    assert right == round(top1 / 100 * 359)
    np.testing.assert_allclose(100 * right / 359, top1)
    results = _evaluations(tmp_path / "runs" / "digits", digits_dir, environment)
    assert results["float32", "held-out"] == pytest.approx(top1)
    # one of the 1,438 images is 0.07
    assert results["bfloat16", "train"] == pytest.approx(results["float32", "train"], abs=0.2)


def _learned(folder: Path, out: str) -> float:
    """The top-1 of the best evaluation, which is what the folder stands for, once the run has been looked at."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert f"held-out top-1 {lines[-1]['eval/top1']:.2f} %" in out
    best = max(line["eval/top1"] for line in lines if "eval/top1" in line)
    assert best > 85  # after all epochs of the recipe it is above 95
    return best


def _right_in_timm(checkpoint, data_dir):
    """How many of the held-out images timm gets right with it."""
    model = timm.create_model("crossvit_tiny_240", num_classes=10, img_size=48, img_scale=(1.0, 2 / 3))
    model.load_state_dict(torch.load(checkpoint, weights_only=True), strict=True)
    source, transform = open_digits(data_dir).held_out, eval_transform(RECIPES["digits"].model_config(10))
    samples = [transform(source[i]) for i in range(len(source))]
    images = torch.tensor(normalised(np.stack([sample["image"] for sample in samples]))).permute(0, 3, 1, 2)
    with torch.no_grad():
        right = model.eval()(images).argmax(1).numpy() == [sample["label"] for sample in samples]
    return right.sum()


def _evaluations(folder: Path, data_dir, environment) -> dict[tuple[str, str], float]:
    """The top-1 of `train.evaluate`, by precision and split."""
    runs = (("float32", "held-out"), ("float32", "train"), ("bfloat16", "train"))
    flags = ["--weights", str(folder), "--dataset", "digits", "--data-dir", str(data_dir)]
    outputs = {run: folder.parent / "-".join(run) for run in runs}
    calls = [[*flags, "--precision", p, "--split", s, "--output", str(out)] for (p, s), out in outputs.items()]
    code = f"from train.evaluate import main; assert not any([main(flags) for flags in {calls}])"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    return {run: json.loads((out / "evaluation.json").read_text())["top1"] for run, out in outputs.items()}
