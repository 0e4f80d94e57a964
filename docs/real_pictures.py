"""Data sets of real pictures, from what three Python packages carry: see real-pictures.md.

    python docs/real_pictures.py trees|photographs|clearings|nuclei|tissue FOLDER

The packages are found, never imported, and nothing is downloaded.
"""

import argparse
import gzip
import importlib.util
import json
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

# trees: deepforest's photographs, of which one is held out
TREES_FOLDER = "deepforest/data"
HELD_OUT_PHOTOGRAPH = "2019_YELL_2_541000_4977000_image_crop.png"
TILE = 240
LEAST_LEFT = 0.4  # of a box that the edge of a tile cuts, or it is left out

# clearings: windows of deepforest's largest photograph, whose lower part is held out
CLEARINGS_PHOTOGRAPH = "2019_YELL_2_528000_4978000_image_crop2.png"
WINDOW, WINDOW_STEP = 120, 40
HELD_OUT_ROWS = 1 / 3

# nuclei: stardist's picture, whose left half is trained on
NUCLEI_FOLDER = "stardist/data/images"
NUCLEI_TILE, NUCLEI_STEP = 96, 32

# tissue: nilearn's brain, of which a slab is held out; beside it slices are left out, as neighbours look alike
TISSUE_FOLDER = "nilearn/datasets/data"
TISSUE_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
FIRST_SLICE, LAST_SLICE = 20, 145
HELD_OUT_SLAB, GUARD = (80, 104), 6
TISSUES = ("background", "fluid", "grey matter", "white matter")

_Box = tuple[float, float, float, float]


class Unusable(Exception):
    """A package or folder that cannot be used; the message is one line."""


def package_folder(path: str) -> Path:
    """A folder inside a package, which is found and not imported."""
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / rest).is_dir():
            return Path(place) / rest
    raise Unusable(f"{path} is not there: pip install --no-deps {package}")


# --- trees ---


def photographs(data: Path) -> Iterator[tuple[str, Image.Image, list[_Box]]]:
    """Name, picture and boxes of each photograph with an XML file in Pascal VOC's form."""
    for file in sorted(data.glob("*.xml")):
        root = ElementTree.parse(file).getroot()
        name = root.findtext("filename", "")
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = [tuple(float(box.findtext(key)) for key in corners) for box in root.iter("bndbox")]
        with Image.open(data / name) as picture:
            yield name, picture.convert("RGB"), boxes


def starts(length: int, side: int, step: int) -> list[int]:
    """Where tiles begin so that they cover a length; the last one is moved inside."""
    if length <= side:
        return [0]
    return [min(start, length - side) for start in range(0, length - side + step, step)]


def cut_boxes(boxes: Sequence[_Box], left: int, top: int, side: int) -> list[_Box]:
    """The boxes in a tile, in its pixels, cut at its edges; those of which less than 40 % is left are left out."""
    kept = []
    for x1, y1, x2, y2 in boxes:
        cut = tuple(min(max(value, 0), side) for value in (x1 - left, y1 - top, x2 - left, y2 - top))
        area = max(0, cut[2] - cut[0]) * max(0, cut[3] - cut[1])
        if area > 0 and area >= LEAST_LEFT * (x2 - x1) * (y2 - y1):
            kept.append(cut)
    return kept


class Coco:
    """One side of a data set in COCO's layout."""

    def __init__(self, folder: Path, side: str):
        self._folder, self._side = folder, side
        (folder / "images" / side).mkdir(parents=True)
        self._images: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []

    def add(self, name: str, picture: Image.Image, boxes: Sequence[_Box]) -> None:
        number = len(self._images) + 1
        picture.save(self._folder / "images" / self._side / name)
        self._images.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
        for x1, y1, x2, y2 in boxes:
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            self._boxes.append({"id": len(self._boxes) + 1, "image_id": number, "category_id": 1, **box})

    def write(self) -> str:
        about = {"images": self._images, "annotations": self._boxes, "categories": [{"id": 1, "name": "tree"}]}
        file = self._folder / "annotations" / f"instances_{self._side}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(about))
        return f"{self._side}: {len(self._images)} pictures with {len(self._boxes)} trees"


def write_trees(out: Path) -> list[str]:
    """Tiles of the photographs, side by side."""
    return _write_coco(out, tiled=True)


def write_photographs(out: Path) -> list[str]:
    """The photographs as they are: for `--tile`."""
    return _write_coco(out, tiled=False)


def _write_coco(out: Path, *, tiled: bool) -> list[str]:
    data = package_folder(TREES_FOLDER)
    sides = {side: Coco(out, side) for side in ("train", "val")}
    for name, picture, boxes in photographs(data):
        side = sides["val" if name == HELD_OUT_PHOTOGRAPH else "train"]
        if not tiled:
            side.add(name, picture, cut_boxes(boxes, 0, 0, max(picture.size)))
            continue
        for top in starts(picture.height, TILE, TILE):
            for left in starts(picture.width, TILE, TILE):
                tile = picture.crop((left, top, left + TILE, top + TILE))
                side.add(f"{Path(name).stem}-{left}-{top}.png", tile, cut_boxes(boxes, left, top, TILE))
    return [side.write() for side in sides.values()]


def write_clearings(out: Path) -> list[str]:
    """Windows with a tree, and without any, in a folder for each: for a classifier.

    Those with less of one are left out. Windows overlap, but none of them one of the other side.
    """
    found = (one for one in photographs(package_folder(TREES_FOLDER)) if one[0] == CLEARINGS_PHOTOGRAPH)
    _, picture, boxes = next(found)
    border = round(picture.height * (1 - HELD_OUT_ROWS))
    counts = {(side, name): 0 for side in ("train", "val") for name in ("ground", "tree")}
    for side, top, bottom in (("train", 0, border), ("val", border, picture.height)):
        for y in range(top, bottom - WINDOW + 1, WINDOW_STEP):
            for x in range(0, picture.width - WINDOW + 1, WINDOW_STEP):
                touched = any(x1 < x + WINDOW and x2 > x and y1 < y + WINDOW and y2 > y for x1, y1, x2, y2 in boxes)
                name = "tree" if cut_boxes(boxes, x, y, WINDOW) else "ground"
                if touched == (name == "tree"):
                    folder = out / side / name
                    folder.mkdir(parents=True, exist_ok=True)
                    picture.crop((x, y, x + WINDOW, y + WINDOW)).save(folder / f"{x}-{y}.png")
                    counts[side, name] += 1
    return [f"{side}: {count} windows of {name}" for (side, name), count in counts.items()]


# --- nuclei and tissue ---


class Masks:
    """Pictures with masks whose values are classes."""

    def __init__(self, folder: Path, classes: Sequence[str]):
        self._folder, self._counts = folder, {"train": 0, "val": 0}
        for side in self._counts:
            for kind in ("images", "masks"):
                (folder / side / kind).mkdir(parents=True)
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))

    def add(self, side: str, name: str, pixels: np.ndarray, classes: np.ndarray) -> None:
        for kind, values in (("images", pixels), ("masks", classes)):
            Image.fromarray(np.ascontiguousarray(values, np.uint8)).save(self._folder / side / kind / f"{name}.png")
        self._counts[side] += 1

    def told(self) -> list[str]:
        return [f"{side}: {count} pictures" for side, count in self._counts.items()]


def write_nuclei(out: Path) -> list[str]:
    """Tiles of the left half to train on, which overlap, and of the right half, side by side."""
    data = package_folder(NUCLEI_FOLDER)
    image, mask = (np.asarray(Image.open(data / name)) for name in ("img2d.tif", "mask2d.tif"))
    dark, bright = np.percentile(image, (1, 99.8))
    pixels = np.clip((image - dark) / (bright - dark) * 255, 0, 255).round().astype(np.uint8)
    nuclei = (mask > 0).astype(np.uint8)
    middle = image.shape[1] // 2
    halves = {"train": (slice(None, middle), NUCLEI_STEP), "val": (slice(middle, None), NUCLEI_TILE)}
    masks = Masks(out, ("background", "nucleus"))
    for side, (columns, step) in halves.items():
        half, truth = pixels[:, columns], nuclei[:, columns]
        for top in starts(half.shape[0], NUCLEI_TILE, step):
            for left in starts(half.shape[1], NUCLEI_TILE, step):
                tile = (slice(top, top + NUCLEI_TILE), slice(left, left + NUCLEI_TILE))
                masks.add(side, f"{left}-{top}", half[tile], truth[tile])
    return masks.told()


def write_tissue(out: Path) -> list[str]:
    """Axial slices, the forehead above."""
    data = package_folder(TISSUE_FOLDER)
    brain, grey, white = (read_nifti(data / TISSUE_FILE.format(kind)) for kind in ("t1", "gm", "wm"))
    masks = Masks(out, TISSUES)
    first, last = HELD_OUT_SLAB
    for z in range(FIRST_SLICE, LAST_SLICE):
        if first <= z < last:
            side = "val"
        elif first - GUARD <= z < last + GUARD:
            continue
        else:
            side = "train"
        shares = np.stack([255.0 - grey[..., z] - white[..., z], grey[..., z], white[..., z]])
        classes = np.where(brain[..., z] > 0, 1 + shares.argmax(0), 0)
        masks.add(side, f"slice-{z:03}", np.rot90(brain[..., z]), np.rot90(classes))
    return masks.told()


def read_nifti(file: Path) -> np.ndarray:
    """The volume in a compressed NIfTI-1 file of bytes: x from left to right, y to the front, z up."""
    content = gzip.decompress(file.read_bytes())
    rank, *sizes = struct.unpack("<8h", content[40:56])
    (kind,) = struct.unpack("<h", content[70:72])
    (start,) = struct.unpack("<f", content[108:112])
    if rank != 3 or kind != 2:
        raise Unusable(f"{file} is no volume of bytes")
    return np.frombuffer(content, np.uint8, offset=int(start)).reshape(sizes[:3], order="F")


SETS: dict[str, Callable[[Path], list[str]]] = {
    "trees": write_trees,
    "photographs": write_photographs,
    "clearings": write_clearings,
    "nuclei": write_nuclei,
    "tissue": write_tissue,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=SETS)
    parser.add_argument("folder", type=Path, help="which is made; it must not be there")
    args = parser.parse_args(argv)
    try:
        if args.folder.exists():
            raise Unusable(f"{args.folder} is there already: name a new folder")
        for line in SETS[args.data_set](args.folder):
            print(line)
    except (Unusable, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
