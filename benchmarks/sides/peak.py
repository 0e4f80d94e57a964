"""A yardstick that is the same for every side: the most FLOPs that a device reaches in a second."""

import math
import time
from collections.abc import Callable
from typing import Any

PRODUCT = {"cpu": 2048, "gpu": 8192}  # rows and columns of both factors
_AT_ONCE = {"cpu": 1, "gpu": 20}  # products between two looks at the clock
_SECONDS = 1.0


def peak_flops(device: str, multiply: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """FLOPs per second, two per multiply-add, of the fastest of the products that fill a second.

    `multiply` begins to compute a product of two random matrices, `PRODUCT[device]` on each side; `wait` waits for it.
    """
    wait(multiply())  # compiles
    fastest, end = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end or fastest == math.inf:
        start = time.perf_counter()
        for _ in range(_AT_ONCE[device]):
            product = multiply()
        wait(product)
        fastest = min(fastest, (time.perf_counter() - start) / _AT_ONCE[device])
    return 2 * PRODUCT[device] ** 3 / fastest
