"""The most probable classes of image files."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from convert.files import shown, writing
from crossvit_jax import CrossViT
from train.data.bad_images import BadImages
from train.data.tagged_images import TaggedImages
from train.inference.evaluation import without_bad
from train.inference.image_paths import FileSource
from train.inference.model import Classifier
from train.inference.predictions import Prediction
from train.pictures.attention import attention_of_all_layers, draw_attention


def probabilities(model: CrossViT, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch classes"]:
    """The probability of each class for normalised images."""
    return jax.nn.softmax(model(images))


def best_classes(
    probabilities: Float[np.ndarray, " classes"], class_names: Sequence[str], top_k: int
) -> list[Prediction]:
    """The most probable classes of an image, the best first; of equal ones that with the lower index."""
    best = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
    return [Prediction(class_names[i], i, float(probabilities[i])) for i in best]


class Result(NamedTuple):
    """What is known of one image."""

    path: str
    predictions: Sequence[Prediction]  # the best first
    picture: str | None = None  # where its attention is drawn, if it is


def classify(
    classifier: Classifier,
    source: FileSource,
    bad_images: BadImages,
    *,
    batch_size: int,
    workers: int,
    top_k: int,
    pictures: Sequence[Path] | None = None,
    tagged: TaggedImages | None = None,
) -> Iterator[list[Result]]:
    """The results of image files, in their order, batch by batch as they are ready.

    Args:
        bad_images: told which images cannot be read, and are left out.
        batch_size: a multiple of the number of devices.
        workers: processes that read images; 0: threads of this process.
        top_k: predictions per image; where there are fewer classes, all of them.
        pictures: for each image, the PNG in which to draw what the class tokens attend to. Raises NotWritten.
        tagged: told which images have an EXIF orientation.
    """
    from train.data.batches import eval_batches  # late: Grain takes long to import
    from train.data.streams import device_batches

    task = classifier.task

    def program(model: Any, batch: Any) -> Any:
        outputs = {"probability": probabilities(model, batch["image"]), "mask": batch["mask"]}
        if pictures:
            outputs |= {"image": batch["image"], "attention": attention_of_all_layers(model, batch["image"])}
        return outputs

    def result(place: int, outputs: Any) -> Result:
        path = source.paths[place]
        predictions = best_classes(outputs["probability"], task.class_names, top_k)
        return Result(path, predictions, drawn(place, predictions, outputs) if pictures else None)

    def drawn(place: int, predictions: list[Prediction], outputs: Any) -> str:
        told = [(p.class_name, p.probability) for p in predictions]
        seen = {name: outputs[name] for name in ("image", "attention")}
        title = shown(source.paths[place])
        with writing(pictures[place]):
            draw_attention(pictures[place], classifier.config, title=title, predictions=told, **seen)
        return str(pictures[place])

    batches = eval_batches(source, task.transform(training=False), batch_size=batch_size, workers=workers, rounds=1)
    shapes = task.batch_shapes(batch_size, training=False)

    with closing(device_batches(batches, classifier.mesh)) as stream:
        run = classifier.run(program, shapes)  # compiles while the first images are read
        for number, outputs in enumerate(run(without_bad(stream, bad_images, shapes, tagged))):
            yield [
                result(number * batch_size + i, jax.tree.map(lambda array, i=i: array[i], outputs))
                for i in np.flatnonzero(outputs["mask"]).tolist()
            ]
