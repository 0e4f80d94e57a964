"""What comes out of an evaluation: the numbers, and the files that keep them."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from train.pictures.confusion import draw_confusion
from train.run.whole_file import write_whole


@dataclass(frozen=True)
class Evaluation:
    """How a model did. Unreadable images count nowhere else."""

    images: int
    bad_images: int
    loss: float  # mean cross-entropy
    top5: float | None  # in percent; below 6 classes it would say nothing
    confusion: Int[np.ndarray, "classes classes"]  # images by true class (row) and predicted class
    seconds: float

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * np.trace(self.confusion).item() / self.images

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    def summary(self) -> str:
        """A few lines for the user."""
        lines = [f"top-1       {self.top1:.2f} %"]
        if self.top5 is not None:
            lines.append(f"top-5       {self.top5:.2f} %")
        lines.append(f"loss        {self.loss:.4f}")
        lines.append(f"images      {self.images} (unreadable: {self.bad_images})")
        lines.append(f"speed       {self.images_per_s:.0f} images/s")
        return "\n".join(lines)


def write_evaluation(evaluation: Evaluation, folder: Path, *, names: Sequence[str], about: dict[str, Any]) -> list[str]:
    """Write an evaluation into a folder: numbers, accuracy per class, and the confusion matrix as CSV and PNG.

    Args:
        names: of the classes.
        about: what was evaluated, as JSON values; the picture's title has its `weights`, `dataset` and `split`.

    Returns the names of the files. Raises OSError if one cannot be written.
    """
    confusion = evaluation.confusion
    totals, right = confusion.sum(1), np.diag(confusion)
    shares = [f"{100 * r / total:.2f}" if total else "" for r, total in zip(right, totals, strict=True)]
    per_class = [("class", "images", "top1"), *zip(names, totals, shares, strict=True)]
    table = [("true \\ predicted", *names), *((name, *row) for name, row in zip(names, confusion, strict=True))]
    result = {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "loss": evaluation.loss,
        "images": evaluation.images,
        "bad_images": evaluation.bad_images,
        "images_per_s": evaluation.images_per_s,
    }
    texts = {
        "evaluation.json": json.dumps({**about, **result}, indent=2) + "\n",
        "per_class.csv": _csv(per_class),
        "confusion.csv": _csv(table),
    }
    for name, text in texts.items():
        write_whole(folder / name, text.encode("utf-8", "surrogateescape"))  # folders may be named in any bytes
    title = f"{Path(about['weights']).name} on {about['dataset']} ({about['split']}): top-1 {evaluation.top1:.2f} %"
    draw_confusion(confusion, names, folder / "confusion.png", title=title)
    return [*texts, "confusion.png"]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
