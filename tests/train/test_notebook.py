"""The notebook docs/notebook.ipynb does what it says: its cells run one after the other, with a small model."""

import json
from pathlib import Path

import pytest
import timm

_NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(small_variant, few_digits_dir, no_curves, tmp_path, monkeypatch, capsys):
    notebook = json.loads(_NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in notebook["cells"])  # of another machine's run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", few_digits_dir)
    timms_own, names, outputs = timm.create_model, {}, []
    # timm has no model of the small variant: its own Ti, without the weights, stands in
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: timms_own("crossvit_tiny_240", num_classes=10))
    monkeypatch.setattr("convert.formats.write.check_for_timm", lambda config: None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(_NOTEBOOK), "exec"), names)
            outputs.append(capsys.readouterr().out)
    trained, metrics, predicted, attention, published = outputs
    assert "held-out top-1" in trained
    assert metrics.startswith("held-out top-1 after each epoch: ['")
    assert "10 classes: 0, 1, 2" in predicted
    assert predicted.count("is taken for") == 8
    assert "pays most to patch" in attention
    assert "written     notebook.hf" in published
    assert {path.name for path in Path("notebook.hf").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
