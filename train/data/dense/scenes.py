"""Scenes of real handwritten digits, whose boxes and masks are known: data for detection and segmentation in the
package.

A scene is drawn from its seed and index: one to four of scikit-learn's digits, in various sizes and contrasts, before
noise. Scenes for training hold training digits only, held-out scenes held-out digits only (see
`train.data.held_out`), and held-out scenes are the same for every seed.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from convert.digits import held_out_indices, load_digits
from train.data.dense.samples import DenseSets, Kind
from train.data.sources import HELD_OUT_SPLITS
from train.images.geometry import Boxes

SIDE = 96  # pixels
TRAIN_SCENES, HELD_OUT_SCENES = 2000, 256
CLASS_NAMES = tuple(map(str, range(10)))
BACKGROUND = "background"
MOST_DIGITS = 4

_SMALLEST, _LARGEST = 24, 48  # pixels
_CONTRAST = 0.6, 1.0
_NOISE = 64  # levels below which the background is
_MASK = 64  # a digit is where its own level is above
_OVERLAP = 0.1  # of the smaller box, at most
_TRIES = 20  # places for a digit; after that, it is left out
_HELD_OUT_SEED = 2**32  # that no run can have


@dataclass(frozen=True, eq=False)
class DigitScenes:
    """Scenes as a source, see `train.data.dense.samples.DenseSource`."""

    digits: UInt8[np.ndarray, "digits 8 8"]
    labels: Int[np.ndarray, " digits"]
    seed: int
    kind: Kind
    scenes: int
    endless: bool  # see `DenseSource`

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels, objects, segments = self._draw(index)
        encoded = b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes()  # PPM, which costs nothing to read
        return {"image": encoded, "name": f"scene {index}", **self._asked_for(objects, segments)}

    def truth(self, index: int) -> dict[str, Any]:
        _, objects, segments = self._draw(index)
        return {"name": f"scene {index}", "image_id": int(index), **self._asked_for(objects, segments)}

    def _asked_for(self, objects: Boxes, segments: np.ndarray) -> dict[str, Any]:
        return {"segments": segments} if self.kind == "segmentation" else {"objects": objects, "size": (SIDE, SIDE)}

    def _draw(self, index: int) -> tuple[UInt8[np.ndarray, "side side 3"], Boxes, UInt8[np.ndarray, "side side"]]:
        rng = np.random.default_rng((self.seed, int(index)))
        levels = rng.integers(0, _NOISE, (SIDE, SIDE)).astype(np.float32)
        segments = np.zeros((SIDE, SIDE), np.uint8)
        boxes: list[tuple[int, int, int, int]] = []
        classes, areas = [], []
        for _ in range(rng.integers(1, MOST_DIGITS + 1)):
            chosen, side = rng.integers(len(self.digits)), rng.integers(_SMALLEST, _LARGEST + 1)
            contrast, corners = rng.uniform(*_CONTRAST), rng.integers(SIDE - side + 1, size=(_TRIES, 2)).tolist()
            digit = np.asarray(Image.fromarray(self.digits[chosen]).resize((side, side), Image.Resampling.BICUBIC))
            mask = digit > _MASK
            left, top, right, bottom = _tight_box(mask)
            for x, y in corners:
                box = x + left, y + top, x + right, y + bottom
                if all(_overlap(box, other) < _OVERLAP for other in boxes):
                    break
            else:
                continue
            place = slice(y, y + side), slice(x, x + side)
            share = digit * np.float32(1 / 255)
            levels[place] += share * (255 * contrast - levels[place])
            segments[place][mask] = self.labels[chosen] + 1
            boxes.append(box)
            classes.append(self.labels[chosen])
            areas.append(mask.sum())
        grey = (levels + 0.5).astype(np.uint8)
        objects = Boxes(
            np.array(boxes, np.float32), np.array(classes, np.int32), np.zeros(len(boxes), bool), np.array(areas, float)
        )
        return np.repeat(grey[..., None], 3, axis=-1), objects, segments


def open_scenes(kind: Kind, *, seed: int) -> DenseSets:
    """The scenes of a task: new ones in each epoch of training, by `seed`, and always the same held out."""
    digits, labels = _digits()
    held_out = np.zeros(len(labels), bool)
    held_out[held_out_indices(labels)] = True
    names = CLASS_NAMES if kind == "detection" else (BACKGROUND, *CLASS_NAMES)
    return DenseSets(
        DigitScenes(digits[~held_out], labels[~held_out], seed, kind, TRAIN_SCENES, endless=True),
        DigitScenes(digits[held_out], labels[held_out], _HELD_OUT_SEED, kind, HELD_OUT_SCENES, endless=False),
        names,
        HELD_OUT_SPLITS[0],
        f"digit scenes 2 {kind}",  # not the seed: whatever it is, no held-out digit is trained on
        kind=kind,
        most_boxes=MOST_DIGITS,
        category_ids=tuple(range(len(names))),
    )


_digits = cache(load_digits)  # a set is opened several times


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around what is true."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Of two boxes, as share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
