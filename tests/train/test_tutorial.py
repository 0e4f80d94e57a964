"""The page docs/fine-tuning.md does what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"


@pytest.mark.slow
def test_every_block_of_the_tutorial_works_in_a_new_folder(digits_dir, tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_PAGE.parents[1]),
        "TFDS_DATA_DIR": digits_dir,
    }
    outputs = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", _PAGE.read_text(), re.DOTALL):
        command = {"sh": ["bash", "-e", "-c", block], "python": [sys.executable, "-c", block]}[language]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout + done.stderr)
    pictures, checkpoint, interrupted, resumed, evaluated, predicted, converted, loaded = outputs
    assert pictures == ""
    assert "held-out top-1" in checkpoint
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
