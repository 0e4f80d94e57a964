"""The memory of a step: XLA's plan, what a device has, and what is said where that is too little."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from crossvit_jax.config import get_config
from tests.train.small_weights import save_small
from train.compile import main as compile_main
from train.data import streams
from train.devices import host_memory, memory
from train.devices.memory import (
    DoesNotFit,
    StepMemory,
    available_memory,
    check_fits,
    check_image_size,
    format_bytes,
    memory_errors_explained,
    step_memory,
)
from train.devices.mesh import make_mesh
from train.job import _check_image_size
from train.main import main
from train.predict import main as predict_main
from train.recipes import RECIPES

_GIB = 2**30
_CONFIG = dataclasses.replace(RECIPES["imagenet"], batch_size=64, precision="float32")


class _Mesh:
    """A mesh of devices that are not there."""

    def __init__(self, data=1, fsdp=1, *, devices=None):
        self.size, self.shape = data * fsdp, {"data": data, "fsdp": fsdp}
        self.devices = type("Devices", (), {"flat": [devices or _Device("gpu")] * self.size})


class _Device:
    process_index = 0

    def __init__(self, platform, stats=None):
        self.platform, self.device_kind, self.memory_stats = platform, "some kind", lambda: stats


def _message(mesh, *, state=1 * _GIB, activations=20 * _GIB, available=16 * _GIB, **changes):
    step = StepMemory(state=state, batches=_GIB, activations=activations, program=0)
    with pytest.raises(DoesNotFit) as error:
        check_fits(step, available, dataclasses.replace(_CONFIG, **changes), mesh)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("size", "settings", "words"),
    [
        ((40_000, 40_000), {}, "17.9 GiB on each device, 1.9 GiB more"),  # the pixels of one
        ((40_000, 40_000), {"images": 2}, "a smaller --image-size or a smaller --batch-size"),
        ((24_000, 24_000), {"known": True, "images": 2}, "of which 2 images take 12.9 GiB"),
        ((2_400, 2_400), {"known": True, "training": True}, "3 maps of attention of branch 0 take 17.9 GiB"),
    ],
)
def test_images_that_certainly_do_not_fit_are_refused_before_anything_is_traced(size, settings, words):
    branches = get_config("ti").branches if settings.pop("known", False) else ()
    mesh = _Mesh(devices=_Device("cpu"))
    with pytest.raises(DoesNotFit, match=r"image_size .* needs at least") as error:
        check_image_size(size, branches, mesh, available=16 * _GIB, **settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_images_that_may_fit_are_not_refused():
    mesh, branches = _Mesh(devices=_Device("gpu")), get_config("ti").branches
    check_image_size((2_400, 2_400), branches, mesh, available=16 * _GIB, training=True)  # a GPU keeps no maps
    check_image_size((40_000, 40_000), (), mesh, available=None)  # not known


def test_only_images_that_are_computed_together_are_counted_against_memory(monkeypatch):
    monkeypatch.setattr("train.job.available_memory", lambda mesh: 2**27)
    config = dataclasses.replace(RECIPES["digits"], image_size=480, batch_size=64)
    with pytest.raises(DoesNotFit, match="64 images take"):
        _check_image_size(config, make_mesh())
    _check_image_size(dataclasses.replace(config, grad_accum=64), make_mesh())


def test_commands_refuse_too_large_images_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 16 * _GIB)
    weights, picture = save_small(tmp_path / "w.safetensors", "abc"), tmp_path / "1.png"
    Image.new("RGB", (50, 40)).save(picture)
    for side, words in ((60_000, "image_size must have at most 2,147,483,647 pixels"), (45_360, "needs at least")):
        for command, *flags in (
            (main, f"--output={tmp_path / 'run'}"),
            (main, f"--output={tmp_path / 'run'}", f"--init={weights}"),
            (main, f"--output={tmp_path / 'run'}", "--task=detection"),
            (compile_main,),
            (predict_main, f"--weights={weights}", str(picture)),
        ):
            begin = time.process_time()
            assert command([*flags, f"--image-size={side}"]) == 2
            assert time.process_time() - begin < 5
            last = capsys.readouterr().err.splitlines()[-1]
            assert words in last or (side == 60_000 and "needs at least" in last)
    assert not (tmp_path / "run").exists()


def test_the_plan_of_a_step_is_told_apart_by_purpose():
    def step(state, batch):
        hidden = jnp.sin(batch @ state)  # (64, 256): something that is there only during the step
        return state - batch.T @ jnp.cos(hidden), jnp.sum(hidden)

    shapes = jax.ShapeDtypeStruct((128, 256), jnp.float32), jax.ShapeDtypeStruct((64, 128), jnp.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    planned = step_memory(compiled)
    assert planned.state == 4 * 128 * 256
    assert planned.batches == memory.BATCHES * 4 * 64 * 128
    assert 4 * 64 * 256 <= planned.activations < 10 * 4 * 64 * 256
    augmented = step_memory(compiled, augmented=64 * 128)
    assert augmented.batches == (4 + 2 * 1) * 64 * 128  # those that wait are uint8
    assert planned.total == planned.state + planned.batches + planned.activations + planned.program


def test_the_batches_that_wait_are_as_many_as_are_brought_ahead():
    assert memory.BATCHES == 1 + streams.BATCHES_AHEAD


def test_the_line_names_what_is_needed_what_there_is_and_for_what():
    step = StepMemory(state=100 * 2**20, batches=3 * 2**20, activations=int(1.1 * _GIB), program=0)
    assert step.describe(int(78.3 * _GIB)) == (
        "memory per device: 1.2 GiB of 78.3 GiB (parameters and optimiser 100 MiB, batches 3 MiB, activations 1.1 GiB)"
    )
    on_tpu = dataclasses.replace(step, program=64 * 2**20)
    assert on_tpu.describe(None).startswith("memory per device: 1.3 GiB (parameters")
    assert on_tpu.describe(None).endswith("activations 1.1 GiB, program 64 MiB)")


@pytest.mark.parametrize(
    ("size", "words"), [(5500, "5.37 KiB"), (2**20, "1 MiB"), (2**30 - 1, "1.0 GiB"), (21.94 * 2**30, "21.9 GiB")]
)
def test_sizes_in_words(size, words):
    assert format_bytes(size) == words


def test_the_devices_of_a_cpu_share_the_machines_memory(monkeypatch):
    mesh = make_mesh()
    whole = available_memory(mesh) * jax.local_device_count()
    monkeypatch.setattr(jax, "local_device_count", lambda *_: 8)
    assert available_memory(mesh) == pytest.approx(whole / 8, abs=8)


@pytest.mark.parametrize(("content", "limited"), [(f"{_GIB}\n", True), ("max\n", False)])
def test_a_container_has_what_it_is_allowed(monkeypatch, tmp_path, content, limited):
    (tmp_path / "memory.max").write_text(content)
    monkeypatch.setattr(host_memory, "_LIMITS", [tmp_path / "absent"])
    physical = host_memory.host_memory()
    monkeypatch.setattr(host_memory, "_LIMITS", [tmp_path / "absent", tmp_path / "memory.max"])
    assert host_memory.host_memory() == (_GIB if limited else physical)


@pytest.mark.parametrize(("stats", "expected"), [({"bytes_limit": 5}, 5), ({}, None), (None, None)])
def test_an_accelerator_says_itself_what_it_has(stats, expected):
    assert available_memory(_Mesh(devices=_Device("gpu", stats))) == expected


def test_a_step_that_fits_or_whose_device_is_not_known_passes():
    step = StepMemory(state=1, batches=1, activations=1, program=1)
    check_fits(step, 4, _CONFIG, _Mesh())
    check_fits(step, None, _CONFIG, _Mesh())


def test_a_step_that_does_not_fit_is_refused_with_the_excess_and_the_flags_that_help():
    assert _message(_Mesh(data=4)) == (
        "a step needs 22.0 GiB on each device, 6.0 GiB more than the 16.0 GiB that it has; what would help: "
        "--precision bfloat16, --grad-accum 2, --grad-checkpointing, a smaller --batch-size"
    )


def test_flags_that_are_used_already_are_not_named():
    message = _message(_Mesh(fsdp=4), precision="bfloat16", grad_checkpointing=True, grad_accum=4)
    assert message.endswith("what would help: --grad-accum 8, a smaller --batch-size")


def test_bfloat16_is_no_advice_for_a_cpu():
    assert "bfloat16" not in _message(_Mesh(devices=_Device("cpu")))


def test_the_state_is_cut_over_the_devices_where_it_is_what_takes_the_room():
    assert "--mesh fsdp=8" in _message(_Mesh(data=8), state=12 * _GIB)
    assert "--mesh" not in _message(_Mesh(data=8), state=_GIB)
    assert "--mesh" not in _message(_Mesh(data=1), state=12 * _GIB)
    assert "--mesh" not in _message(_Mesh(data=4, fsdp=2), state=12 * _GIB)


@pytest.mark.parametrize(
    ("activations", "batch_size", "expected"),
    [
        (27, 64, "--grad-accum 2,"),  # 14 GiB are left for the activations
        (29, 64, "--grad-accum 4,"),
        (29, 60, "--grad-accum 3,"),  # must divide the 15 images of a device
        (14 * 17, 64, None),  # not even one image at a time would fit
    ],
)
def test_as_many_parts_are_advised_as_make_it_fit(activations, batch_size, expected):
    message = _message(_Mesh(data=4), activations=activations * _GIB, batch_size=batch_size)
    assert expected in message if expected else "--grad-accum" not in message


def test_where_no_flag_is_left_the_model_is_too_large():
    message = _message(_Mesh(data=64, fsdp=1), state=_GIB, precision="bfloat16", grad_checkpointing=True)
    assert message.endswith("what would help: a smaller --variant or --image-size")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (  # libtpu 0.0.42
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.86G) "
            "exceeds available HBM (15.75G).",
            "a step needs 26.9 GiB on each device, 11.1 GiB more than the 15.8 GiB that it has",
        ),
        (  # older ones
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G "
            "of 15.48G hbm. Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:",
            "a step needs 21.9 GiB on each device, 6.5 GiB more than the 15.5 GiB that it has",
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment OOM",
            "a device ran out of memory when 4.4 GiB more was asked for",
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0",
            "a device ran out of memory when 176 MiB more was asked for",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.", "when 2.0 GiB more was asked for"),
        ("RESOURCE_EXHAUSTED: something new", "a device ran out of memory; what would help: "),
    ],
)
def test_xlas_errors_are_told_in_one_line(text, told):
    with pytest.raises(DoesNotFit) as error, memory_errors_explained(_CONFIG, _Mesh(data=4)):
        raise jax.errors.JaxRuntimeError(text)
    message = str(error.value)
    assert told in message
    assert "\n" not in message
    assert "--grad-accum 2, --grad-checkpointing, a smaller --batch-size" in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("INTERNAL: something else"),
        RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem."),
        ValueError("RESOURCE_EXHAUSTED"),
    ],
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as raised, memory_errors_explained(_CONFIG, _Mesh()):
        raise error
    assert raised.value is error


def test_a_real_allocation_that_fails_is_told_in_one_line():
    huge = jax.jit(lambda x: jnp.sort(jnp.broadcast_to(x, (2**44,))) + x)
    with pytest.raises(DoesNotFit, match=r"ran out of memory.*GiB more"), memory_errors_explained(_CONFIG, _Mesh()):
        jax.block_until_ready(huge(jnp.float32(1)))


def test_a_run_that_does_not_fit_is_refused_before_it_begins(
    small_variant, few_digits_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("train.loop.available_memory", lambda mesh: 2**20)
    status = main(
        [f"--data-dir={few_digits_dir}", f"--output={tmp_path / 'run'}", "--epochs=2", "--batch-size=40", "--workers=0"]
    )
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "more than the 1 MiB that it has; what would help: " in line
    assert not (tmp_path / "run" / "config.json").exists()
