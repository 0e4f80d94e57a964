"""Whether an exported detector keeps the boxes that follow from its raw outputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from convert.export.compare import Outputs
from crossvit_jax.config import DetectorConfig

NEAR = 1e-4  # of scores, of overlaps, and of coordinates as a share of the image: what rounding may decide

Found = Mapping[str, np.ndarray]  # of one image: `boxes`, `scores` and `labels` of what is valid


@dataclass(frozen=True)
class KeptBoxes:
    """The boxes of an exported detector beside those that `detect` makes of the same raw outputs."""

    kept: int
    near: int  # that only one of the two keeps, within `NEAR` of a threshold
    apart: int  # that only one of the two keeps, for no such reason
    images: str

    @property
    def passed(self) -> bool:
        return self.apart == 0

    def __str__(self) -> str:
        but = f", but for {self.near} within {NEAR:g} of a threshold" if self.near else ""
        apart = f"; {self.apart} boxes are kept by one of the two alone: TOO MANY" if self.apart else ""
        return f"on {self.images} it keeps the {self.kept} boxes that its raw outputs give{but}{apart}"


def kept_of(outputs: Mapping[str, np.ndarray], config: DetectorConfig) -> dict[str, np.ndarray]:
    """What the PyTorch twin's `detect` makes of raw outputs."""
    import torch

    from crossvit_torch.boxes import make_points
    from crossvit_torch.detection import detections_of

    raw = {name: torch.from_numpy(np.array(array)) for name, array in outputs.items()}
    found = detections_of(raw, make_points(config), config.image_size)
    return {name: tensor.numpy() for name, tensor in found.items()}


def compare_kept(got: Outputs, expected: Outputs, config: DetectorConfig, images: str) -> KeptBoxes:
    """Compares detections as `detect` returns them, image by image, whatever their order."""
    near = apart = kept = 0
    for one, other in zip(_images(got), _images(expected), strict=True):
        alone, other_alone = _without_partner(one, other, config), _without_partner(other, one, config)
        kept += len(one["scores"]) - alone.sum()
        for mine, theirs, mine_alone, theirs_alone in (
            (one, other, alone, other_alone),
            (other, one, other_alone, alone),
        ):
            decided = _decided_by_rounding(mine, theirs, theirs_alone)
            near += int((mine_alone & decided).sum())
            apart += int((mine_alone & ~decided).sum())
    return KeptBoxes(int(kept), near, apart, images)


def _images(found: Outputs) -> list[Found]:
    rows = range(len(found["valid"]))
    return [{name: found[name][row][found["valid"][row]] for name in ("boxes", "scores", "labels")} for row in rows]


def _without_partner(mine: Found, theirs: Found, config: DetectorConfig) -> Bool[np.ndarray, " mine"]:
    """Which boxes have no equal among the others; each of these is an equal once."""
    side = max(config.image_size)
    alone, free = np.ones(len(mine["scores"]), bool), np.ones(len(theirs["scores"]), bool)
    for i, (box, score, label) in enumerate(zip(mine["boxes"], mine["scores"], mine["labels"], strict=True)):
        same = free & (theirs["labels"] == label) & (np.abs(theirs["scores"] - score) <= NEAR)
        same &= np.abs(theirs["boxes"] - box).max(axis=-1, initial=0) <= NEAR * side
        if same.any():
            alone[i], free[same.argmax()] = False, False
    return alone


def _decided_by_rounding(mine: Found, theirs: Found, alone: Bool[np.ndarray, " theirs"]) -> Bool[np.ndarray, " mine"]:
    """Which boxes may be missing among the others: near the score threshold; near the last of a full list; or beside a
    box of their class, where the overlap is near its threshold, the scores are, or that box is missing here.
    """
    from convert.export.onnx_detections import THRESHOLDS

    scores = mine["scores"]
    decided = scores <= THRESHOLDS["score_threshold"] + NEAR
    if len(theirs["scores"]) == THRESHOLDS["max_detections"]:
        decided |= scores <= theirs["scores"].min() + NEAR
    overlap = _overlaps(mine["boxes"], theirs["boxes"])
    overlap[mine["labels"][:, None] != theirs["labels"]] = 0
    beyond = overlap - THRESHOLDS["iou_threshold"]
    equal = np.abs(scores[:, None] - theirs["scores"]) <= NEAR
    return decided | ((beyond >= -NEAR) & ((beyond <= NEAR) | equal | alone)).any(axis=1)


def _overlaps(a: Float[np.ndarray, "a 4"], b: Float[np.ndarray, "b 4"]) -> Float[np.ndarray, "a b"]:
    """Intersection over union; 0 for boxes of no area."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    shared = sides.clip(0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
