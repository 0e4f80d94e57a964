"""The arithmetic of a traced program, counted."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from crossvit_jax.config import VARIANTS, get_config
from crossvit_jax.kernels import attention, tpu_attention
from crossvit_jax.kernels.attention import dot_product_attention
from tests.train.steps import classification, make_train_step
from train.cost.flops import matrix_flops
from train.optim.optimizer import make_optimizer
from train.optim.state import abstract_model, abstract_state
from train.recipes import RECIPES

_X, _W = jnp.zeros((8, 32)), jnp.zeros((32, 16))
_IMAGES, _KERNEL = jnp.zeros((2, 24, 24, 3)), jnp.zeros((4, 4, 3, 5))
_PATCHES = 2 * (2 * 6 * 6 * 5) * (4 * 4 * 3)  # multiply-adds are two


def _count(function, *arguments) -> int:
    return matrix_flops(jax.make_jaxpr(function)(*arguments))


def _embed(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (lambda x, w: jnp.sin(x @ w) + 1, (_X, _W), 2 * 8 * 32 * 16),
        (lambda x: jnp.einsum("bhq,bhk->bqk", x, x), (jnp.zeros((3, 4, 5)),), 2 * 3 * 4 * 5 * 5),
        (lambda x, w: jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), (_X, _W), 2 * (2 * 8 * 32 * 16)),
        (lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0], (jnp.eye(9),), 7 * 2 * 9**3),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x), (jnp.eye(9),), 2 * 2 * 9**3),
        (lambda x: jax.jit(jax.vmap(lambda row: row @ x))(x), (jnp.eye(9),), 2 * 9**3),
        (_embed, (_IMAGES, _KERNEL), _PATCHES),
        (lambda x, w: jax.grad(lambda w: jnp.sum(_embed(x, w) ** 2))(w), (_IMAGES, _KERNEL), 2 * _PATCHES),
        (jax.grad(lambda x, w: jnp.sum(_embed(x, w) ** 2), argnums=(0, 1)), (_IMAGES, _KERNEL), 3 * _PATCHES),
    ],
    ids=["product", "batched", "gradient", "loop", "choice", "nested", "patches", "kernel-gradient", "both-gradients"],
)
def test_products_and_convolutions_count_two_per_multiply_add(function, arguments, expected):
    assert _count(function, *arguments) == expected


@pytest.mark.parametrize("tokens", [19, 400])  # the latter in pieces
def test_attention_by_the_kernel_for_tpus_counts_as_xlas_does(tokens, monkeypatch):
    monkeypatch.setattr(tpu_attention, "_SCORES", 2**18)

    def gradient(implementation):
        def loss(*qkv):
            return dot_product_attention(*qkv, implementation).sum()

        return _count(jax.grad(loss, (0, 1, 2)), *[jnp.zeros((2, tokens, 3, 8))] * 3)

    # the choices of `jax.lax.platform_dependent` count as their dearest
    monkeypatch.setattr(attention, "_on_tpu", attention._tpu_kernel)
    assert gradient("tpu") == 7 * 2 * (2 * 3 * 8 * tokens**2) >= gradient("xla")


def test_what_each_device_does_counts_for_all_of_them():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    cut = jax.sharding.PartitionSpec("data")
    assert _count(jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=cut, out_specs=cut), _X) == 4 * (2 * 2 * 2 * 32)


def test_what_checkpointing_computes_again_counts_again():
    def loss(w, body):
        return jnp.sum(jnp.sin(body(_X, w)) ** 2)

    def body(x, w):
        return jnp.sin(x @ w) @ w.T

    plain = _count(lambda w: jax.grad(loss)(w, body), _W)
    checkpointed = _count(lambda w: jax.grad(loss)(w, jax.checkpoint(body)), _W)
    assert plain < checkpointed <= plain + 2 * (2 * 8 * 32 * 16)


def _flops_per_image(**changes) -> float:
    config = dataclasses.replace(RECIPES["imagenet"], batch_size=8, **changes)
    task = classification(config, 1000)
    model = abstract_model(task, config)
    optimizer = make_optimizer(config, steps_per_epoch=10, no_weight_decay=model.no_weight_decay())
    step = jax.jit(make_train_step(model, optimizer, config))
    state = abstract_state(model, optimizer, config)
    batch = task.batch_shapes(config.batch_size, training=True)
    return matrix_flops(step.trace(state, batch).jaxpr) / config.batch_size


def _multiply_adds_of_ti() -> dict[str, int]:
    """Of one image's forward pass, layer by layer on paper."""
    config = get_config("ti")
    tokens = [1 + rows * columns for rows, columns in config.grid_size]
    parts = {"resize": 3 * 224 * 240 * (240 + 224), "embed": 0, "rest": 0, "scores": 0}
    for branch, (dim, patch, depth) in enumerate(zip(config.embed_dim, config.patch_size, config.depth, strict=True)):
        own, other = tokens[branch], tokens[1 - branch]
        wide, heads = config.embed_dim[1 - branch], config.num_heads[1 - branch]
        parts["embed"] += (own - 1) * patch**2 * 3 * dim
        block = own * (4 * dim**2 + 2 * 4 * dim**2) + 2 * own**2 * dim
        # the class token in the other branch: query, key, value and output once, scores and sum over all tokens
        fusion = 2 * dim * wide + 4 * wide**2 + 2 * heads * other * wide
        parts["rest"] += config.stages * (depth * block + fusion) + dim * config.num_classes
        parts["scores"] += config.stages * depth * own**2 * dim
    return parts


def test_fused_attention_is_two_products_and_its_gradient_five(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct((2, tokens, 3, 8), jnp.bfloat16) for tokens in (6, 10))

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").astype(jnp.float32).sum()

    product = 2 * (2 * 3 * 6 * 10 * 8)
    assert _count(attend, q, k, k) == 2 * product
    assert _count(jax.grad(attend, (0, 1, 2)), q, k, k) == (2 + 5) * product


def test_a_training_step_is_as_counted_on_paper_and_less_of_it_is_less(monkeypatch):
    # two stages of ti are traced faster than three
    monkeypatch.setitem(VARIANTS, "ti", VARIANTS["ti"].replace(depth=(1, 2), stages=2))
    parts = _multiply_adds_of_ti()
    whole = _flops_per_image()
    # the gradient of a product is two more, but the images need none; self-attention's makes the scores again
    multiply_adds = parts["resize"] + 2 * parts["embed"] + 3 * parts["rest"] + parts["scores"]
    assert whole == pytest.approx(2 * multiply_adds, rel=1e-3)
    assert _flops_per_image(grad_accum=4) == pytest.approx(whole, rel=1e-3)
    # what follows a block's last nonlinearity is not needed again
    assert 1.2 * whole < _flops_per_image(grad_checkpointing=True) < 4 / 3 * whole
    assert _flops_per_image(freeze_backbone=True) == pytest.approx(
        2 * (parts["resize"] + parts["embed"] + parts["rest"]), rel=0.01
    )
