"""Damaged and hostile data sets for detection and segmentation, and detectors' and segmenters' descriptions."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convert.command_line import run
from convert.streams import tell
from crossvit_jax.preprocess import UnreadableImage
from tests.fuzz.damage import VALUES, damage_a_file, damaged_bytes, damaged_json
from train.data.dense.open import open_dense_sets
from train.data.dense.samples import DenseSets
from train.images.dense import DetectionTrainTransform, SegmentationTrainTransform
from train.images.geometry import IGNORED

_SIZE = (40, 30)  # width, height
_PICTURES = 6
_CLASSES = ("cat", "dog", "=cow")
_BOMB = '<!DOCTYPE a [<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9)) + "]>"
_FILE = '<!DOCTYPE a [<!ENTITY a9 SYSTEM "file:///etc/passwd">]>'
_YAML = ["&a [*a]", "{a: &b [1, *b]}", "!!python/object/apply:os.system ['true']", "[" * 3000, "1e999", "2001-13-01"]
_NESTED = "\n  - &a0 [x, x]\n" + "".join(f"  - &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9))
_LINES = ["0 0.5 0.5 nan 0.1", "1e999 0 0 1 1", "0 " + "0.5 " * 9999, "-1 0.5 0.5 0.1 0.1", "9" * 5000, "0 1_0 0 1 1"]
_LISTED = ["/dev/zero.png", "..", "", "a.png", "\0"]


# --- the data sets as they should be ---


def make_dense_templates(folder: Path) -> None:
    """A data set of each format in a folder of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (_PICTURES, *_SIZE[::-1], 3), dtype=np.uint8)
    for kind, below in (("coco", "."), ("voc", "JPEGImages"), ("yolo", "images"), ("masks", "images")):
        place = folder / kind / below
        place.mkdir(parents=True)
        for number in range(_PICTURES):
            Image.fromarray(pixels[number]).save(place / f"{number}.png")
    (folder / "coco" / "all.json").write_text(json.dumps(_coco_content()))
    annotations = folder / "voc" / "Annotations"
    annotations.mkdir()
    labels = folder / "yolo" / "labels"
    labels.mkdir()
    (folder / "masks" / "masks").mkdir()
    for number in range(_PICTURES):
        (annotations / f"{number}.xml").write_text(_voc_content(number))
        (labels / f"{number}.txt").write_text(f"{number % 3} 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.2 0.1 0.2 0.3\n")
        values = np.arange(_SIZE[0] * _SIZE[1], dtype=np.uint8).reshape(_SIZE[::-1]) % 3
        Image.fromarray(values).save(folder / "masks" / "masks" / f"{number}.png")
    (folder / "yolo" / "data.yaml").write_text("path: .\ntrain: images\nnc: 3\nnames: [cat, dog, '=cow']\n")
    (folder / "masks" / "classes.txt").write_text("\n".join(_CLASSES))


def _coco_content() -> dict[str, Any]:
    sized = {"width": _SIZE[0], "height": _SIZE[1]}
    boxes = [[2, 3, 10, 12], [20, 5, 15.5, 20], [0, 0, 5, 5]]
    return {
        "images": [{"id": number, "file_name": f"{number}.png", **sized} for number in range(_PICTURES)],
        "annotations": [
            {"id": 10 * number + k, "image_id": number, "category_id": k + 1, "bbox": box, "area": 9, "iscrowd": 0}
            for number in range(_PICTURES)
            for k, box in enumerate(boxes)
        ],
        "categories": [{"id": k + 1, "name": name, "supercategory": "x"} for k, name in enumerate(_CLASSES)],
    }


def _voc_content(number: int) -> str:
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>21</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name><difficult>0</difficult>{box}</object>" for name in _CLASSES)
    size = f"<size><width>{_SIZE[0]}</width><height>{_SIZE[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{number}.png</filename>{size}{objects}</annotation>"


# --- what comes of them ---


def _opened(dataset: str, kind: str) -> int:
    def command() -> int:
        sets = open_dense_sets(dataset, kind, seed=0, val_fraction=0.34)
        tell(f"{sets.class_names} {sets.notes}")
        for source in (sets.train, sets.held_out):
            for index in range(len(source)):
                _check_sample(sets, source, index)
        return 0

    return run("train", command)


def _check_sample(sets: DenseSets, source: Any, index: int) -> None:
    rng, size = np.random.default_rng(index), (48, 48)
    try:
        sample = source[index]
        if sets.kind == "segmentation":
            made = SegmentationTrainTransform(size)(sample, rng)
            assert set(np.unique(made["segments"]).tolist()) <= {*range(len(sets.class_names)), IGNORED}
        else:
            made = DetectionTrainTransform(size, most_boxes=sets.most_boxes)(sample, rng)
            boxes = made["boxes"][made["present"]]
            assert np.isfinite(boxes).all()
            assert (boxes >= 0).all()
            assert (boxes <= 48).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert set(made["classes"].tolist()) <= set(range(len(sets.class_names)))
    except UnreadableImage as error:
        assert len(str(error)) < 10_000
    else:
        assert np.isfinite(made["image"]).all()


def _copied(templates: Path, work: Path, kind: str) -> Path:
    return Path(shutil.copytree(templates / kind, work / kind))


def coco(chance: random.Random, templates: Path, work: Path) -> int:
    root = _copied(templates, work, "coco")
    if chance.random() < 0.2:
        damage_a_file(chance, root)
    else:
        (root / "all.json").write_bytes(damaged_json(chance, _coco_content()))
    return _opened(f"coco:{root / 'all.json'}", "detection")


def voc(chance: random.Random, templates: Path, work: Path) -> int:
    root, how = _copied(templates, work, "voc"), chance.random()
    file = root / "Annotations" / "0.xml"
    if how < 0.3:
        damage_a_file(chance, root)
    elif how < 0.4:
        text = chance.choice([_BOMB, _FILE]) + _voc_content(0).replace("cat", "&a9;")
        file.write_text(text)
    elif how < 0.7:
        old = chance.choice(["cat", "0.png", ">3<", ">21<", ">40<", "<name>", "<difficult>0"])
        value = chance.choice(VALUES)
        new = old[:1] * (old[:1] in "<>") + str(value) + old[-1:] * (old[-1:] in "<>")
        file.write_text(_voc_content(0).replace(old, new), errors="surrogatepass")
    else:
        file.write_bytes(damaged_bytes(chance, file.read_bytes()))
    return _opened(f"voc:{root}", "detection")


def yolo(chance: random.Random, templates: Path, work: Path) -> int:
    root, how = _copied(templates, work, "yolo"), chance.random()
    yaml = root / "data.yaml"
    if how < 0.2:
        damage_a_file(chance, root)
    elif how < 0.4:
        yaml.write_bytes(damaged_bytes(chance, yaml.read_bytes()))
    elif how < 0.7:
        values = {"path": ".", "train": "images", "nc": 3, "names": list(_CLASSES)}
        values[chance.choice(["path", "train", "val", "nc", "names"])] = None
        lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
        text = chance.choice([*_YAML, _NESTED]) if chance.random() < 0.5 else json.dumps(chance.choice(VALUES))
        yaml.write_text("\n".join(line if not line.endswith("null") else line[:-4] + text for line in lines))
    else:
        (root / "labels" / "0.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{chance.choice(_LINES)}\n")
    if chance.random() < 0.1:
        (root / "list.txt").write_text(f"images/0.png\nimages/1.png\n{chance.choice(_LISTED)}\n")
        if yaml.is_file():
            yaml.write_bytes(yaml.read_bytes().replace(b"train: images", b"train: list.txt"))
    return _opened(f"yolo:{yaml}", "detection")


def masks(chance: random.Random, templates: Path, work: Path) -> int:
    root, how = _copied(templates, work, "masks"), chance.random()
    mask, classes = root / "masks" / "0.png", root / "classes.txt"
    if how < 0.3:
        damage_a_file(chance, root)
    elif how < 0.5:
        mask.write_bytes(damaged_bytes(chance, mask.read_bytes()))
    elif how < 0.7:
        mode = chance.choice(["1", "L", "P", "RGB", "RGBA", "I", "F", "LA", "I;16", "CMYK"])
        size = chance.choice([_SIZE, _SIZE[::-1], (1, 1), (3_000, 2_000)])
        mask.unlink()
        if size[0] > 1000 and mode in ("I", "F", "RGBA", "CMYK"):
            mode = "L"
        form = "TIFF" if mode in ("F", "CMYK") else "PNG"
        Image.new(mode, size).save(mask.with_suffix(f".{form.lower()}"), form)
    elif how < 0.85:
        classes.write_bytes(damaged_bytes(chance, classes.read_bytes()))
    else:
        value = chance.choice(VALUES)
        last = chance.choice(["", "dog 300 1 1\n", "\n\n", "cat 1 2 3\n"])
        classes.write_text(f"{value}\ncat 1 2 3\n{last}", errors="replace")
    return _opened(f"masks:{root}", "segmentation")


DENSE_KINDS: dict[str, Callable[[random.Random, Path, Path], int]] = {
    kind.__name__: kind for kind in (coco, voc, yolo, masks)
}
