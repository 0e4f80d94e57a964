"""Classes of millions of pictures by Ray Data: python docs/serving/ray_data.py SOURCE LIST OUT

LIST has a path a line. OUT gets a file for every 1,000 of them, whole or not at all; started again, the rest is done.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import ray

from convert.files import write_whole
from crossvit_jax.preprocess import UnreadableImage
from train.inference.classify import best_classes
from train.inference.image_paths import FileSource
from train.inference.model import load_classifier
from train.inference.server.engines.jax_engine import JaxEngine

PICTURES_PER_FILE, BATCH = 1000, 32


class Classify:
    """One in each of Ray's actors: it loads and compiles once."""

    def __init__(self, source: str):
        self.engine, self.threads = JaxEngine(load_classifier(source), BATCH, explains=False), ThreadPoolExecutor()
        self.engine.compile()

    def image(self, files: FileSource, place: int) -> np.ndarray | str:
        try:
            return self.engine.transform(files[place])["image"]
        except UnreadableImage as error:
            return error.reason

    def rows(self, files: FileSource) -> Iterator[dict]:
        for first in range(0, len(files), BATCH):
            places = range(first, min(first + BATCH, len(files)))
            images = list(self.threads.map(partial(self.image, files), places))
            good = [image for image in images if not isinstance(image, str)]
            found = iter(self.engine.compute(np.stack(good)) if good else [])
            for place, image in zip(places, images, strict=True):
                if isinstance(image, str):
                    yield {"path": files.paths[place], "error": image}
                else:
                    best = best_classes(next(found), self.engine.class_names, 5)
                    yield {"path": files.paths[place], "predictions": [vars(one) for one in best]}

    def __call__(self, parts: dict[str, np.ndarray]) -> dict[str, list]:
        for file, paths in zip(parts["file"], parts["paths"], strict=True):
            lines = [json.dumps(row) + "\n" for row in self.rows(FileSource(tuple(paths.splitlines())))]
            write_whole(Path(file), "".join(lines).encode())
        return {"file": list(parts["file"])}


if __name__ == "__main__":
    source, paths, out = sys.argv[1], Path(sys.argv[2]).read_text().splitlines(), Path(sys.argv[3]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    texts = ["\n".join(paths[first : first + PICTURES_PER_FILE]) for first in range(0, len(paths), PICTURES_PER_FILE)]
    # a name has a sum of the paths: with another LIST, it is another file
    names = [f"{number:08}-{crc32(text.encode()):08x}.jsonl" for number, text in enumerate(texts)]
    parts = [{"file": str(out / name), "paths": text} for name, text in zip(names, texts, strict=True)]
    left = [part for part in parts if not Path(part["file"]).exists()]
    print(f"{len(parts) - len(left)} of {len(parts)} files are there")
    if left:
        # an actor for each machine, whose cores jax shares among its pictures, or for each GPU: num_gpus=1
        actors = ray.data.ActorPoolStrategy(min_size=1, max_size=8)
        how = {"fn_constructor_args": (source,), "batch_size": 1, "compute": actors, "num_cpus": 1}
        done = ray.data.from_items(left, override_num_blocks=len(left)).map_batches(Classify, **how)
        for row in done.iter_rows():
            print(row["file"])
