"""What is found in pictures that are cut in windows is at its place in the picture."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import convert
from crossvit_jax.detection import CrossViTDetector
from crossvit_jax.preprocess import MEAN, STD
from crossvit_jax.segmentation import CrossViTSegmenter
from tests.small_model import small_detector, small_segmenter
from tests.train.small_weights import save_small
from train import evaluate, predict
from train.data.bad_images import BadImages
from train.devices.mesh import make_mesh
from train.images.tiles import Tiling
from train.inference import tiles
from train.inference.image_paths import FileSource
from train.inference.model import Predictor
from train.inference.tiles import found_in_windows
from train.recipes import RECIPES
from train.tasks.detection import Detection
from train.tasks.segmentation import Segmentation


def _bright(images):
    return images * jnp.array(STD) + jnp.array(MEAN) > 0.5


class _ColouredBoxes(Detection):
    """Finds what is red, green or blue and ends inside of the image: a box of each colour."""

    def found(self, model, images):
        bright = _bright(images)
        boxes, valid = [], []
        for colour in range(3):
            sides = []
            for axis in (2, 1):  # of columns, of rows
                line = bright[..., colour].any(3 - axis)
                sides.append((line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1), line))
            (left, right, columns), (top, bottom, rows) = sides
            boxes.append(jnp.stack([left, top, right, bottom], axis=1).astype(jnp.float32))
            cut = columns[:, 0] | columns[:, -1] | rows[:, 0] | rows[:, -1]
            valid.append(columns.any(1) & ~cut)
        shape = (len(images), 3)
        labels = jnp.broadcast_to(jnp.arange(3), shape)
        return {
            "boxes": jnp.stack(boxes, axis=1),
            "scores": jnp.full(shape, 0.9) - labels / 10,
            "labels": labels,
            "valid": jnp.stack(valid, axis=1),
        }


class _BrightPixels(Segmentation):
    """Takes pixels for the class whose colour they have, or for 0 where they are dark."""

    def found(self, model, images):
        return {"logits": jnp.concatenate([jnp.full((*images.shape[:3], 1), 0.5), _bright(images)], axis=-1)}


def _predictor(task):
    graphdef, state = nnx.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    return Predictor(task, None, (), None, "float32", graphdef, nnx.to_pure_dict(state), make_mesh())


def _save(path, pixels):
    Image.fromarray(pixels).save(path)
    return str(path)


_BOXES = [(100, 20, 112, 30), (55, 60, 63, 71), (2, 85, 14, 97)]


@pytest.fixture
def pictures(tmp_path):
    """One that is cut in many windows, one that cannot be read, and one smaller than a window; blocks of colour in
    them."""
    large, small = np.zeros((99, 150, 3), np.uint8), np.zeros((24, 24, 3), np.uint8)
    for colour, (left, top, right, bottom) in enumerate(_BOXES):
        large[top:bottom, left:right, colour] = 255
    small[4:10, 6:16, 1] = 255
    (tmp_path / "b.png").write_bytes(b"no picture")
    paths = (_save(tmp_path / "a.png", large), str(tmp_path / "b.png"), _save(tmp_path / "c.png", small))
    return FileSource(paths), large, small


def _found(task, source):
    bad_images = BadImages(source, lambda line: None)
    how = {"batch_size": 4, "workers": 0}
    found = dict(found_in_windows(_predictor(task), source, bad_images, Tiling(48, 0.5), **how))
    assert bad_images.names == [source.paths[1]]
    return found


def test_boxes_of_windows_are_where_the_objects_are_and_each_is_told_once(pictures):
    found = _found(_ColouredBoxes(RECIPES["detection"], small_detector(96), tuple("rgb")), pictures[0])
    assert list(found) == [0, 2]
    boxes, scores, labels = found[0]
    assert labels.tolist() == [0, 1, 2]
    np.testing.assert_allclose(boxes, _BOXES, atol=1)  # a pixel of the model's is half of one of the picture's
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.7], rtol=1e-6)
    boxes, _, labels = found[2]
    np.testing.assert_allclose(boxes, [[6, 4, 16, 10]], atol=0.5)
    assert labels.tolist() == [1]


def test_pixels_of_windows_have_the_class_that_they_have_in_the_picture(pictures):
    source, *pixels = pictures
    found = _found(_BrightPixels(RECIPES["segmentation"], small_segmenter(48), tuple("xrgb")), source)
    assert list(found) == [0, 2]
    colours = pixels[0] > 127
    np.testing.assert_array_equal(found[0][0], np.where(colours.any(-1), 1 + colours.argmax(-1), 0))
    assert found[2][0].shape == (24, 24) and (found[2][0][5:9, 8:14] == 2).all()


def test_pictures_too_large_to_be_read_ahead_are_decoded_one_by_one_with_the_same_result(pictures, monkeypatch):
    source = pictures[0]
    task = _BrightPixels(RECIPES["segmentation"], small_segmenter(48), tuple("xrgb"))
    expected = _found(task, source)
    kept = []
    monkeypatch.setattr(tiles, "largest_kept", lambda workers: 3 * 24 * 24)  # the smaller one
    read = tiles._Read.__call__
    monkeypatch.setattr(tiles._Read, "__call__", lambda *a: (kept.append(read(*a)), kept[-1])[1])
    found = _found(task, source)
    assert [one["place"] for one in kept if "pixels" not in one] == [0]
    assert list(found) == list(expected)
    for place in found:
        np.testing.assert_array_equal(found[place][0], expected[place][0])


# --- the commands ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a detector and a segmenter that find something."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    models = (CrossViTDetector, small_detector()), (CrossViTSegmenter, small_segmenter())
    for kind, config in models:
        params = nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(0))))
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(0)
        leaves = [np.asarray(leaf) + 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
        names = [f"class {number}" for number in range(config.num_classes)]
        path = folder / f"{config.task}.safetensors"
        convert.save(jax.tree.unflatten(tree, leaves), config, path, class_names=names)
        paths[config.task] = str(path)
    return paths


@pytest.fixture
def photo_file(photo, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(photo)  # 130 x 90
    return str(path)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_picture_of_one_window_is_predicted_as_a_whole_one(task, weights, photo_file, capsys):
    def told(*flags):
        assert predict.main(["--weights", weights[task], "--batch-size=1", "--format=jsonl", photo_file, *flags]) == 0
        return json.loads(capsys.readouterr().out)

    whole = told()
    assert whole["objects" if task == "detection" else "classes"]
    assert told("--tile=130") == told("--tile=5000", "--overlap=0") == whole
    assert told("--tile=64") != whole


def test_large_pictures_are_evaluated_in_windows(weights, photo, tmp_path, capsys):
    boxes = [([10, 20, 30, 40], 1), ([70, 10, 50, 60], 2)]
    entries = [
        {"id": number, "image_id": number, "area": box[2] * box[3], "bbox": box, "category_id": category}
        for number, (box, category) in enumerate(boxes, start=1)
    ]
    names = [f"class {number}" for number in range(3)]
    about = {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 130, "height": 90} for number in (1, 2)],
        "annotations": entries,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    (tmp_path / "all.json").write_text(json.dumps(about))
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(photo)

    def figures(name, *flags):
        common = ["--weights", weights["detection"], "--batch-size=1", f"--dataset=coco:{tmp_path / 'all.json'}"]
        assert evaluate.main([*common, "--val-fraction=.5", f"--output={tmp_path / name}", *flags]) == 0
        return json.loads((tmp_path / name / "evaluation.json").read_text()), capsys.readouterr().out

    (whole, _), (one, _), (many, out) = figures("a"), figures("b", "--tile=130"), figures("c", "--tile=64")
    assert "in windows of 64 pixels that overlap by 25%" in out and "loss" not in out
    assert (whole["tile"], one["tile"], many["tile"], many["overlap"]) == (None, 130, 64, 0.25)
    same = ("ap", "ap50", "ar1", "ar100")
    assert [one[name] for name in same] == [whole[name] for name in same]
    assert "loss" in whole and "loss" not in many and many["images"] == 1


def test_windows_that_make_no_sense_are_refused_in_a_line(weights, photo_file, tmp_path, capsys):
    classifier = save_small(tmp_path / "w.safetensors", "abc")

    def error(*flags, weights=weights["detection"]):
        try:
            status = predict.main([f"--weights={weights}", photo_file, *flags])
        except SystemExit as exit_:
            status = exit_.code
        out, told = capsys.readouterr()
        assert (status, out, told.count("\n")) == (2, "", 1)
        return told

    assert "--tile is not for classification" in error("--tile=64", weights=classifier)
    assert "--overlap is of the windows of --tile" in error("--overlap=0.5")
    assert "from 0 to 0.9; got '1'" in error("--tile=64", "--overlap=1")
    assert "--tile" in error("--tile=0")
