"""From the bytes of pictures that somebody sent to images as the model sees them."""

import asyncio
import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from crossvit_jax.preprocess import UnreadableImage
from train.devices.decoding import decoding_memory
from train.images.decode import decode_pixels
from train.inference.server.engines.engine import Transform
from train.inference.server.limits import Limits, Refusal
from train.inference.server.metrics import Metrics

# What browsers and cameras send. Pillow knows forty more, some of them with a history of flaws.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_LONGEST_PREFIX = 16  # bytes that Pillow looks at to tell a format


class Picture(NamedTuple):
    """A picture that somebody sent."""

    image: np.ndarray  # (height, width, 3), uint8: what the model sees
    size: tuple[int, int]  # height and width as it was sent
    pixels: np.ndarray | None = None  # (height, width, 3), uint8, where they are still needed


class Pictures:
    """Decodes in a few threads, whose number bounds how many decoded pictures are in memory."""

    def __init__(self, transform: Transform, limits: Limits, metrics: Metrics):
        self._transform, self._limits, self._metrics = transform, limits, metrics
        self._threads = ThreadPoolExecutor(os.cpu_count(), "decode")

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function's result, computed in one of the threads. Cancelled, it is not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def prepare(self) -> None:
        """Loads and compiles what the first picture would wait for."""
        await self.run(self._transform.seen_pixels, np.zeros((64, 48, 3), np.uint8))

    async def of_files(self, encoded: Sequence[bytes], *, keep_pixels: bool = False) -> list[Picture]:
        """Encoded pictures, decoded. Raises Refusal, naming the picture where there are several."""
        names = ["the picture"] if len(encoded) == 1 else [f"picture {place}" for place in range(1, len(encoded) + 1)]
        reading = [self.run(self._of_file, *one, keep_pixels) for one in zip(encoded, names, strict=True)]
        return list(await asyncio.gather(*reading))

    async def of_pixels(self, pixels: np.ndarray) -> list[Picture]:
        """The same of decoded ones (pictures, height, width, 3), uint8 RGB."""
        self._check_size((pixels.shape[2], pixels.shape[1]), "a picture")
        images = await asyncio.gather(*(self.run(self._transform.seen_pixels, one) for one in pixels))
        return [Picture(image, pixels.shape[1:3]) for image in images]

    def _of_file(self, encoded: bytes, name: str, keep_pixels: bool) -> Picture:
        start = time.monotonic()
        self._check_size(_header_size(encoded, name), name)
        with decoding_memory().returned():
            try:
                pixels = decode_pixels(encoded, name, self._transform.exif, FORMATS)
            except UnreadableImage as error:
                raise Refusal(422, f"{name} cannot be read: {error.reason}") from None
            picture = Picture(self._transform.seen_pixels(pixels), pixels.shape[:2], pixels if keep_pixels else None)
        self._metrics.decode_seconds.observe(time.monotonic() - start)
        return picture

    def _check_size(self, size: tuple[int, int], name: str) -> None:
        width, height = size
        if width * height > self._limits.pixels:
            raise Refusal(413, f"{name} has {width} x {height} pixels; at most {self._limits.pixels} are taken")


def _header_size(encoded: bytes, name: str) -> tuple[int, int]:
    """Width and height as the header tells them: nothing is decoded."""
    if not encoded:
        raise Refusal(422, f"{name} cannot be read: it is empty")
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS).size
    except UnidentifiedImageError:
        prefix = encoded[:_LONGEST_PREFIX]
        if any(accepts is not None and accepts(prefix) is True for _, accepts in map(Image.OPEN.get, FORMATS)):
            raise Refusal(422, f"{name} cannot be read: it is damaged") from None
        raise Refusal(415, f"{name} is in none of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise Refusal(413, f"{name} has more pixels than are taken") from None
    except MemoryError:
        raise
    except Exception as error:  # over damaged files Pillow's parsers stumble in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(422, f"{name} cannot be read: {reason}") from None
