"""What a step costs follows its settings; with libtpu also for slices of TPUs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from crossvit_jax.config import VARIANTS
from tests.train.steps import abstract_classifier
from train.cost.figures import compile_step
from train.cost.slices import CHIPS, slice_devices
from train.devices.memory import DoesNotFit, available_memory, memory_errors_explained
from train.devices.mesh import make_mesh, replicated
from train.recipes import RECIPES


def test_flags_that_change_the_program_change_the_figures(small_variant):
    def figures(**changes):
        return compile_step(dataclasses.replace(RECIPES["digits"], batch_size=16, **changes), num_classes=10)

    plain, other = figures(), figures(grad_accum=4, ema_decay=0.9)
    assert other.memory.activations < plain.memory.activations
    assert other.memory.state == pytest.approx(plain.memory.state * 4 / 3, rel=0.01)  # parameters, 2 moments, average
    assert other.flops == pytest.approx(plain.flops, rel=0.01)
    assert other.compiler_flops is None  # XLA counts a loop once


# --- with the TPU's own compiler ---


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_memory_of_a_chip_is_what_its_compiler_allows(without_tpu, topology):
    mesh = make_mesh(None, slice_devices(topology))
    assert mesh.size == 4
    too_large = jax.jit(lambda x: jnp.sin(x) @ x, in_shardings=replicated(mesh))
    shape = jax.ShapeDtypeStruct((200_000, 200_000), jnp.float32)
    with pytest.raises(DoesNotFit) as error, memory_errors_explained(RECIPES["imagenet"], mesh):
        too_large.lower(shape).compile()
    available = re.search(r"\(([\d.]+)G\)\.", str(error.value.__cause__))[1]
    assert available_memory(mesh) == int(float(available) * 2**30)


@pytest.mark.slow
def test_a_forward_pass_takes_no_more_of_a_chip_than_it_did(without_tpu, monkeypatch):
    monkeypatch.setitem(VARIANTS, "ti", VARIANTS["ti"].replace(depth=(1, 1), stages=1))
    config = dataclasses.replace(RECIPES["imagenet"], variant="ti", batch_size=64)
    figures = compile_step(config, 1000, "v5e:1x1", inference=True)
    assert figures.config.attention_kernel == "tpu"
    # found by compiling; with "xla" 4.56 million, and 186,289,152 bytes
    assert figures.own_kernels == 2  # a block of each branch, of 401 and 197 tokens
    assert figures.cycles <= 1.02 * 2_280_227
    assert figures.memory.activations <= 1.02 * 3_751_936


@pytest.mark.slow
def test_gradients_are_summed_once_and_fsdp_divides_the_state_on_a_slice(without_tpu, monkeypatch):
    monkeypatch.setitem(VARIANTS, "ti", VARIANTS["ti"].replace(depth=(1, 1), stages=1))
    config = dataclasses.replace(RECIPES["digits"], batch_size=32)

    def figures(mesh, **changes):
        return compile_step(dataclasses.replace(config, mesh=mesh, **changes), 10, "v5e:2x2")

    # in the order of "tpu" XLA sends some tokens around instead of parameters, about as many bytes
    data, fsdp = figures("data=4"), figures("fsdp=4", attention_kernel="xla")
    assert (data.own_kernels, fsdp.own_kernels) == (4, 0)  # two blocks, forwards and backwards
    model = abstract_classifier(config.model_config(10))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert (data.devices, data.device_kind, data.config.precision) == (4, "TPU v5 lite", "bfloat16")
    assert data.available == int(15.75 * 2**30)
    assert data.too_much is fsdp.too_much is None

    # gradients travel in the arithmetic's two bytes, those of norms and tokens in four
    assert 2 * parameters <= data.traffic["all-reduce"].volume < 2.3 * parameters
    assert "all-gather" not in data.traffic
    assert data.memory.state >= 3 * 4 * parameters
    assert fsdp.memory.state < 0.4 * data.memory.state
    # every parameter that is cut up is put together at least once
    assert fsdp.traffic["all-gather"].volume > 1.5 * parameters
    assert data.flops == fsdp.flops
    for told in (data, fsdp):
        sent = sum(kind.sent for kind in told.traffic.values())
        assert sent > 0
        assert told.estimate.communication == pytest.approx(sent / CHIPS["TPU v5 lite"].ring)
        assert told.estimate.compute == pytest.approx(told.cycles / CHIPS["TPU v5 lite"].clock)
    assert data.compiler_flops == pytest.approx(data.flops, rel=0.2)
