"""The peak of a device: the FLOPs per second that large matrix products reach there, measured."""

import math
import time
from collections.abc import Callable

PRODUCT = {"cpu": 2048, "gpu": 8192}  # rows and columns of both factors
_AT_ONCE = {"cpu": 1, "gpu": 20}  # products between two looks at the clock
_SECONDS = 1.0


def peak_flops(device: str, multiply: Callable[[int], None]) -> float:
    """FLOPs per second, two per multiply-add, of the fastest of the products that fill a second.

    Args:
        device: cpu or gpu.
        multiply: computes that many products of two matrices of random numbers, `PRODUCT[device]` on each side, and
            returns when the results are there.
    """
    multiply(1)  # compiles
    fastest, end = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end or fastest == math.inf:
        start = time.perf_counter()
        multiply(_AT_ONCE[device])
        fastest = min(fastest, (time.perf_counter() - start) / _AT_ONCE[device])
    return 2 * PRODUCT[device] ** 3 / fastest
