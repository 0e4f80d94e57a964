"""The least time for kernels, against arithmetic by hand."""

import dataclasses

import pytest

from train.cost.gpus import GPUS
from train.cost.hlo import Array
from train.cost.kernels import Kernel
from train.cost.roofline import LargeArray, least_time, roofline

_GPU = dataclasses.replace(  # 1 GFLOP of float32 a millisecond
    GPUS["a4000"], bandwidth=1e12, tensor_flops=1e14, multiprocessors=10, float32_units=50, clock=1.0
)
_KERNEL = Kernel("k", "kLoop", "layers.py:gelu", 1, 6 * 10**8, 4 * 10**8, 0, "f32", (), {})


def test_a_kernel_takes_as_long_as_its_bytes_or_its_flops():
    assert _GPU.float32_flops == 1e12
    assert least_time(_KERNEL, _GPU) == pytest.approx(1e-3)
    assert least_time(dataclasses.replace(_KERNEL, flops=10**10), _GPU) == pytest.approx(1e-2)
    assert least_time(dataclasses.replace(_KERNEL, flops=10**10, dtype="bf16"), _GPU) == pytest.approx(1e-3)


def test_kernels_are_summed_as_often_as_they_run():
    product = dataclasses.replace(_KERNEL, kind="__cublas$lt$matmul", times=3, flops=3 * 10**9)
    attention = dataclasses.replace(_KERNEL, kind="__cudnn$fmhaSoftmax", times=2)
    total = roofline([_KERNEL, product, attention], _GPU)
    assert (total.kernels, total.bytes, total.flops) == (6, 6 * 10**9, 9 * 10**9)
    assert total.seconds == pytest.approx(1e-3 + 3 * 3e-3 + 2 * 1e-3)
    assert total.memory_share == pytest.approx(3 / 12)
    assert total.fused_attention == 2
    assert total.estimate is None  # XLA told none
    assert [(place.kind, place.kernels, place.seconds) for place in total.places] == [
        ("__cublas$lt$matmul", 3, pytest.approx(9e-3)),
        ("__cudnn$fmhaSoftmax", 2, pytest.approx(2e-3)),
        ("kLoop", 1, pytest.approx(1e-3)),
    ]


def test_large_arrays_are_float32_above_50_megabytes():
    def result(dtype, bytes):
        return dataclasses.replace(_KERNEL, results=(Array(dtype, (bytes // 4,), bytes),))

    total = roofline([result("f32", 50_000_000), result("bf16", 90_000_000), result("f32", 50_000_004)], _GPU)
    assert total.large_float32 == (LargeArray("layers.py:gelu", "kLoop", 50_000_004),)


def test_xlas_tables_are_taken_where_they_are_usable():
    def estimate(results, **changes):
        return roofline([dataclasses.replace(_KERNEL, results=results, **changes)], _GPU).estimate

    flat, batched = (Array("bf16", (4, 6), 48),), (Array("bf16", (2, 4, 6), 96),)
    product = {"kind": "__cublas$lt$matmul", "estimates": {"sol": 5000.0}}
    at_least = 1e-3 / 0.9
    assert estimate(flat, **product) == pytest.approx(5e-3)
    assert estimate(batched, **product) == pytest.approx(at_least)
    assert estimate(flat, estimates={"": 2000.0}) == pytest.approx(2e-3)
    assert estimate(flat, estimates={"": 1e6}) == pytest.approx(at_least)  # seconds: absurd
    assert estimate(flat, kind="__triton", estimates={"": 2000.0}) == pytest.approx(at_least)
    assert estimate((), read=0, written=0, estimates={"": 0.1}) == pytest.approx(2e-6)  # a launch takes time too


def test_no_kernels_take_no_time():
    assert roofline([], _GPU).seconds == 0
