import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture(tmp_path):
    """Writes an image file of a (width, height): picture("train/a.jpg", (60, 40))."""

    def write(name, size=(60, 40), orientation=None):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        pixels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, exif=exif)
        return file

    return write


def _with_boxes(places):
    """COCO's content: for each picture the boxes, x, y, width, height, and categories."""
    images = [{"id": 10 + place, "file_name": name, "width": 60, "height": 40} for place, name in enumerate(places)]
    annotations = [
        {"id": 1, "image_id": 10 + place, "category_id": category, "bbox": list(box), "iscrowd": 0}
        for place, boxes in enumerate(places.values())
        for category, *box in boxes
    ]
    for number, entry in enumerate(annotations, start=1):
        entry["id"] = number
        entry["area"] = entry["bbox"][2] * entry["bbox"][3] / 2
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "bird"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def coco(tmp_path, picture):
    """Writes a JSON file beside its pictures, after a change to its content, and returns its path."""

    def write(change=lambda content: None, name="all.json", pictures=None):
        pictures = pictures or {
            "a.png": [(3, 5, 6, 10, 20), (90, 0, 0, 60, 40)],
            "b.png": [(7, 1, 2, 3, 4)],
            "c.png": [],
            "d.png": [(3, 10, 10, 30.5, 20)],
        }
        content = _with_boxes(pictures)
        file = tmp_path / name
        for image in content["images"]:
            picture(str((file.parent / image["file_name"]).relative_to(tmp_path)))
        change(content)
        file.write_text(json.dumps(content))
        return file

    return write
