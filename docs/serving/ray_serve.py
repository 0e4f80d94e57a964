"""A classifier as a Ray Serve application: python docs/serving/ray_serve.py SOURCE [PORT]"""

import asyncio
import sys

import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from crossvit_jax.preprocess import UnreadableImage
from train.images.decode import decode_pixels
from train.inference.classify import best_classes
from train.inference.model import load_classifier
from train.inference.server.engines.jax_engine import JaxEngine
from train.inference.server.pictures import FORMATS

MAX_BATCH = 8


# replicas come and go with the load; where there are GPUs, each asks for one: ray_actor_options={"num_gpus": 1}
@serve.deployment(max_ongoing_requests=4 * MAX_BATCH, max_queued_requests=256, autoscaling_config={"max_replicas": 4})
class CrossViT:
    def __init__(self, source: str):
        self.engine = JaxEngine(load_classifier(source), MAX_BATCH, explains=False)
        self.engine.compile()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.005)
    async def probabilities(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return list(await asyncio.to_thread(self.engine.compute, np.stack(images)))

    def image(self, encoded: bytes) -> np.ndarray:
        transform = self.engine.transform
        return transform.seen_pixels(decode_pixels(encoded, "the picture", transform.exif, FORMATS))

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            image = await asyncio.to_thread(self.image, await request.body())
        except UnreadableImage as error:
            return JSONResponse({"error": str(error)}, 422)
        best = best_classes(await self.probabilities(image), self.engine.class_names, 5)
        keys = ({"class": one.class_name, "index": one.index, "probability": one.probability} for one in best)
        return JSONResponse({"predictions": list(keys)})


if __name__ == "__main__":
    serve.start(http_options={"port": int((sys.argv[2:] or ["8000"])[0])})
    serve.run(CrossViT.bind(sys.argv[1]), route_prefix="/predict", blocking=True)
