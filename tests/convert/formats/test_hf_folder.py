"""A folder as repositories of the hub are: timm loads ours, and ours are read whoever wrote them."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from convert import ConversionError, load_weights, predict
from convert.formats.hf_folder import check_for_timm
from convert.formats.run_folder import told_of
from convert.formats.write import write
from crossvit_jax import get_config
from tests.convert.conftest import refused, run

_NAMES = tuple(f"klasse {i} ä" for i in range(10))


@pytest.fixture
def folder(weights, tmp_path):
    about = {
        "class_names": _NAMES,
        "trained": {"dataset": "digits", "epochs": 14},
        "origin": "the weights after epoch 3",
        "curves": tmp_path / "curves.png",
    }
    about["curves"].write_bytes(b"a picture")
    return write(dataclasses.replace(weights, **about), tmp_path / "out.hf")


def test_timm_makes_the_model_of_our_folder_with_equal_logits(folder, images, logits):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(images), logits)
    data = resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 48, 48), 0.875, "bicubic")
    assert (data["mean"], data["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert tuple(model.pretrained_cfg["label_names"]) == _NAMES


def test_timm_and_transformers_find_the_same_five_classes_on_photographs(folder):
    from transformers import pipeline  # late: it takes seconds

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        found = model(torch.stack([transform(photograph) for photograph in photographs])).softmax(-1).topk(5)
    names = [[model.pretrained_cfg["label_names"][index] for index in row] for row in found.indices]
    answers = pipeline("image-classification", model=str(folder), device="cpu")(photographs, top_k=5)
    for ours, *theirs in zip(predict(folder, photographs), names, found.values, answers, strict=True):
        assert [one.class_name for one in ours] == theirs[0] == [answer["label"] for answer in theirs[2]]
        for probabilities in (theirs[1].numpy(), [answer["score"] for answer in theirs[2]]):
            np.testing.assert_allclose([one.probability for one in ours], probabilities, rtol=2e-5)


def test_the_fields_are_those_that_timm_itself_writes(folder, timm_model, tmp_path):
    save_for_hf(timm_model, tmp_path / "theirs", safe_serialization=True)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "theirs"))
    assert ours.keys() - {"label_names"} <= theirs.keys()
    for key in ("architecture", "num_classes", "num_features"):
        assert ours[key] == theirs[key]
    assert ours["pretrained_cfg"].keys() <= theirs["pretrained_cfg"].keys() | {"license", "crop_mode"}
    for key, value in ours["pretrained_cfg"].items():
        assert key in ("license", "crop_mode") or value == theirs["pretrained_cfg"][key], key
    assert [ours["model_args"][key] for key in ("img_size", "img_scale")] == [48, [1.0, 2 / 3]]


def test_the_card_tells_what_the_model_is_and_how_it_was_trained(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\nlicense: apache-2.0\npipeline_tag: image-classification\n")
    assert "# CrossViT ti, 10 classes" in card and "| epochs | 14 |" in card
    assert "for images of 48 x 48 pixels: resized, bicubic, until they cover 54 x 54, the centre cut out" in card
    assert "![loss, accuracy and learning rate over the steps](curves.png)" in card
    assert (folder / "curves.png").read_bytes() == b"a picture"
    assert "These are the weights after epoch 3." in card and "`klasse 3 ä`" in card


def test_a_run_tells_its_settings_its_last_evaluation_and_its_curves(tmp_path):
    assert told_of(tmp_path) == {"trained": None, "curves": None}
    about = {"train": {"dataset": "digits", "epochs": 2, "init": None}, "data": {"train_images": 7}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    expected = {"dataset": "digits", "epochs": 2, "train images": 7}
    assert told_of(tmp_path)["trained"] == expected
    lines = [{"epoch": epoch, "step": epoch, "eval/loss": 0.1234567, "eval/top1": 90.0 + epoch} for epoch in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"step": 3}]))
    (tmp_path / "curves.png").write_bytes(b"")
    last = {"last evaluation": "epoch 2", "eval/loss": 0.1235, "eval/top1": 92.0}
    assert told_of(tmp_path) == {"trained": expected | last, "curves": tmp_path / "curves.png"}


def test_folders_of_the_hub_are_read_in_one_file_or_several(folder, timm_model, weights, tmp_path):
    assert load_weights(folder).class_names == load_weights(f"local-dir:{folder}").class_names == _NAMES
    several = tmp_path / "several"
    several.mkdir()
    state = timm_model.state_dict()
    parts = {"model-00001-of-00002.safetensors": [*state][:100], "model-00002-of-00002.safetensors": [*state][100:]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, several / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (several / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (folder, several):
        tensors = load_weights(source).tensors
        assert tensors.keys() == weights.tensors.keys()
        assert all(np.array_equal(tensors[name], array) for name, array in weights.tensors.items())
    (several / "config.json").write_text(json.dumps({"mean": [0.5, 0.5, 0.5]}))  # no word on the architecture
    with pytest.raises(ConversionError, match=r"asks for mean \(0\.5, 0\.5, 0\.5\), not"):
        load_weights(several)
    (several / "config.json").unlink()
    (several / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"^model-00002-of-00002\.safetensors of .* does not exist"):
        load_weights(several)
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ConversionError, match="names files that do not lie beside it"):
        load_weights(several)


def test_what_timm_cannot_run_is_refused_before_anything_is_written(small, capsys, tmp_path):
    message = refused(capsys, small, tmp_path / "out.hf")
    assert "timm has no model with the branches of custom" in message
    with pytest.raises(ConversionError, match=r"timm's crossvit_tiny_240 has no depth \(1, 1\) and no "):
        check_for_timm(get_config("ti", stages=1, depth=(1, 1)))
    assert list(tmp_path.iterdir()) == []
    scaled = get_config("ti", image_size=1440, image_scale=(1, Fraction(7, 10)))
    with pytest.raises(ConversionError, match="in timm the branches would see 1440 x 1440 and 1007 x 1007 pixels"):
        check_for_timm(scaled)


def test_a_folder_is_replaced_only_when_asked_for_and_if_it_is_one_of_the_hub(folder, capsys, weights_file):
    assert "exists; --overwrite" in refused(capsys, weights_file, f"{folder}/")
    status, out, _ = run(capsys, weights_file, f"{folder}/", "--overwrite", "--license", "CC0-1.0")
    assert (status, f"written     {folder}" in out) == (0, True)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged: it is not what was written" in refused(capsys, folder, weights_file.parent / "again.pth")
    (folder / "notes.txt").touch()
    assert "other things, such as notes.txt, and is not" in refused(capsys, weights_file, folder, "--overwrite")
    assert (folder / "notes.txt").exists()
    (folder / "notes.txt").unlink()
    assert "\nlicense: cc0-1.0\n" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "cc0-1.0"
    (folder / "model.safetensors").unlink()
    assert "is a folder of other things and" in refused(capsys, weights_file, folder, "--overwrite")
