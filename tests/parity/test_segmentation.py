"""Segmentation: UPerNet against transformers, the mask transformer against timm's blocks, losses; the twins whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import segmentation_models_pytorch as smp
import torch
from flax import nnx
from segmentation_models_pytorch.base.modules import SCSEModule
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from convert.architecture import SameKey
from convert.tree import flatten
from crossvit_jax import segmentation, segmentation_loss
from crossvit_jax.attention import Attention
from crossvit_torch import segmentation as torch_segmentation
from crossvit_torch import segmentation_loss as torch_loss
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    PRECISIONS,
    channels_last,
    error,
    flax_gradients,
    flax_module,
    gradient_errors,
    images,
    perturb,
    random_array,
    torch_gradients,
)
from tests.small_model import small_segmenter

LOSS_BOUND = {"float32": 1e-6, "float64": 1e-12}
CLASSES = 5


def assert_equal_modules(reference, names, twin, build, inputs, precision):
    """Outputs and all gradients of both twins are those of the reference, a decoder of several levels.

    Args:
        names: gives the reference's parameters our names.
        build: makes the Flax module, which returns its output in a list.
    """
    dtype = getattr(torch, precision)
    reference, twin = reference.to(dtype), twin.to(dtype)
    own = {name: parameter.detach().clone() for name, parameter in names(reference.state_dict()).items()}
    twin.load_state_dict(own, strict=True)
    for module in (reference, twin):  # the output as Flax has it
        module.register_forward_hook(
            lambda module, args, x: [x.permute(0, 2, 3, 1)] if len(inputs) > 1 else x.permute(0, 2, 3, 1)
        )
    expected = torch_gradients(reference, inputs, precision)
    of_torch = torch_gradients(twin, inputs, precision)
    with jax.enable_x64(precision == "float64"):
        of_flax = flax_gradients(flax_module(build, own), inputs, precision)
    parameters = names(expected.parameters)
    for result in (of_torch, of_flax):
        assert error(result.outputs[0], expected.outputs[0]) <= OUTPUT_BOUND[precision]
        for got, want in zip(result.inputs, expected.inputs, strict=True):
            assert error(got, want) <= GRADIENT_BOUND[precision]
        errors = gradient_errors(result.parameters, parameters)
        assert max(errors.values()) <= GRADIENT_BOUND[precision], errors


def in_a_list(module: type[nnx.Module]) -> type[nnx.Module]:
    """The module with what `flax_gradients` takes where there are several inputs: outputs in a list."""
    return type(module.__name__, (module,), {"__call__": lambda self, levels: [module.__call__(self, levels)]})


# --- decoders ---

UPerDecoder = in_a_list(segmentation.UPerDecoder)


def _with_group_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            width = child.num_features
            setattr(module, name, nn.GroupNorm(torch_segmentation.num_groups(width), width))
        else:
            _with_group_norm(child)
    return module


class ScsedHead(UperNetHead):
    """transformers' head with smp's attention before the classifier."""

    def __init__(self, config, in_channels):
        super().__init__(config, in_channels)
        self.classifier = nn.Sequential(SCSEModule(in_channels[0]), self.classifier)


def _names_of_upernet(tensors: dict) -> dict:
    changes = {".batch_norm.": ".norm.", "classifier.1.": "classifier.", "classifier.0.cSE.1.": "scse.reduce."}
    changes |= {"classifier.0.cSE.3.": "scse.expand.", "classifier.0.sSE.0.": "scse.spatial."}
    changes |= {f"psp_modules.{i}.1.": f"psp_modules.{i}." for i in range(4)}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scse", [False, True])
def test_the_upernet_decoder_equals_transformers_with_group_norm(scse, precision):
    # the coarsest level has fewer pixels than pyramid pooling has bins, and odd sides
    levels = [random_array(i, 2, 32, *grid) for i, grid in enumerate([(12, 20), (6, 10), (3, 5)])]
    config = UperNetConfig(hidden_size=32, num_labels=CLASSES, use_auxiliary_head=False)
    reference = perturb(_with_group_norm((ScsedHead if scse else UperNetHead)(config, [32] * 3)))
    twin = torch_segmentation.UPerDecoder(32, CLASSES, 3, scse=scse)

    def build(rngs):
        return UPerDecoder(32, CLASSES, 3, scse=scse, param_dtype=precision, rngs=rngs)

    assert_equal_modules(reference, _names_of_upernet, twin, build, levels, precision)


class Segmenter(nn.Module):
    """Segmenter's decoder of timm's blocks and torch's layers, as its paper describes it."""

    def __init__(self, dim: int, classes: int, heads: int):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(2))
        self.decoder_norm, self.mask_norm = norm(dim), nn.LayerNorm(classes)
        self.proj_patch, self.proj_classes = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        batch, _, rows, columns = levels[0].shape
        x = self.proj_dec(levels[0].flatten(2).transpose(1, 2))
        x = torch.cat([x, self.cls_emb.expand(batch, -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.decoder_norm(x).split([rows * columns, self.cls_emb.shape[1]], dim=1)
        patches = functional.normalize(self.proj_patch(patches), dim=-1)
        classes = functional.normalize(self.proj_classes(classes), dim=-1)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).unflatten(2, (rows, columns))


# The last norm enlarges rounding where a point's cosines are nearly alike, for everybody: with 128 channels, 20 x 20
# points and 8 seeds, the gradients of timm's blocks in float32 are 2.9e-6 to 5.7e-6 from their own in float64, ours
# 3.1e-6 to 1.4e-5 (mask_norm.weight, where the torch twin has 9.0e-6). Of whole segmenters both twins are 1.4e-5 to
# 2.8e-5 from float64 and 2e-6 to 6e-6 from one another.
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_mask_transformer_equals_one_of_timms_blocks(precision):
    reference = OneInput(perturb(Segmenter(64, CLASSES, heads=2)))
    twin = OneInput(torch_segmentation.MaskTransformer(64, CLASSES, num_blocks=2, num_heads=2))

    def build(rngs):
        return FlaxOneInput(segmentation.MaskTransformer(64, CLASSES, 2, 2, param_dtype=precision, rngs=rngs))

    level = [random_array(0, 2, 64, 4, 6)]
    assert_equal_modules(reference, dict, twin, build, level, precision)


class OneInput(nn.Module):
    """A decoder of a single level that takes it without a list."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder([x])


class FlaxOneInput(nnx.Module):
    """The same in Flax."""

    def __init__(self, decoder: nnx.Module):
        self.decoder = decoder

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder([x])


# --- losses ---


def some_labels(seed: int = 5, shape=(3, 8, 12), classes: int = CLASSES) -> np.ndarray:
    """With ignored pixels, and without the last class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 1, shape)
    return np.where(rng.uniform(size=shape) < 0.2, segmentation_loss.IGNORED, labels).astype(np.int32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_and_gradients_equal_those_of_torch_and_smp(precision):
    labels, logits = some_labels(), random_array(0, 3, CLASSES, 8, 12) * 3
    x = torch.tensor(logits, dtype=getattr(torch, precision), requires_grad=True)
    y = torch.tensor(labels).long()
    dice = smp.losses.DiceLoss("multiclass", ignore_index=segmentation_loss.IGNORED)
    expected = {"cross_entropy": functional.cross_entropy(x, y, ignore_index=255), "dice_loss": dice(x, y)}
    with jax.enable_x64(precision == "float64"):
        flax_x = jnp.asarray(channels_last(logits), precision)
        for name, want in expected.items():
            (gradient,) = torch.autograd.grad(want, x)
            twin = getattr(torch_loss, name)(x, torch.tensor(labels))
            value, flax_gradient = jax.jit(jax.value_and_grad(getattr(segmentation_loss, name)))(
                flax_x, jnp.asarray(labels)
            )
            assert max(error(twin, want), error(value, want)) <= LOSS_BOUND[precision], name
            assert error(torch.autograd.grad(twin, x)[0], gradient) <= GRADIENT_BOUND[precision], name
            assert error(flax_gradient, channels_last(gradient.numpy())) <= GRADIENT_BOUND[precision], name


def test_parts_of_a_batch_have_its_cross_entropy_when_pixels_were_counted_over_the_whole():
    with jax.enable_x64():
        labels, logits = jnp.asarray(some_labels(shape=(4, 8, 12))), jnp.asarray(random_array(0, 4, 8, 12, CLASSES))
        counts = segmentation_loss.mean_valid_pixels(labels)
        whole = segmentation_loss.cross_entropy(logits, labels)
        halves = [segmentation_loss.cross_entropy(logits[h], labels[h], counts[h]) for h in (slice(0, 1), slice(1, 4))]
        parts = (float(halves[0]) + 3 * float(halves[1])) / 4
    assert abs(parts / float(whole) - 1) < 1e-12
    of_torch = torch_loss.mean_valid_pixels(torch.tensor(np.array(labels)))
    np.testing.assert_array_equal(counts, of_torch)


def test_a_batch_whose_pixels_are_all_ignored_teaches_nothing():
    labels = jnp.full((2, 4, 4), segmentation_loss.IGNORED)
    for loss in (segmentation_loss.cross_entropy, segmentation_loss.dice_loss):
        value, gradient = jax.value_and_grad(loss)(jnp.ones((2, 4, 4, CLASSES)), labels)
        assert value == 0 and not gradient.any()


# --- whole models ---


@pytest.mark.parametrize("settings", [{"scse": True, "strides": (6, 12, 24)}, {"decoder": "mask"}], ids=str)
def test_training_steps_of_the_twins_end_at_the_same_weights_and_leave_the_unused_ones_alone(settings):
    config = small_segmenter((48, 72), **settings)
    rate, steps = 1e-3, 20
    batches = [(random_array(i, 2, 3, 48, 72), some_labels(i, (2, 48, 72), 4)) for i in range(steps)]
    twin = perturb(torch_segmentation.CrossViTSegmenter(config)).double()
    before = {name: x.numpy().copy() for name, x in twin.state_dict().items()}
    assert twin.no_weight_decay() <= before.keys()

    def build(rngs):
        return segmentation.CrossViTSegmenter(config, param_dtype=jnp.float64, rngs=rngs)

    with jax.enable_x64():
        flax = flax_module(build, twin.state_dict())
        assert flax.no_weight_decay() == twin.no_weight_decay()
        graphdef, params = nnx.split(flax)
        params = nnx.to_pure_dict(params)
        is_used = jax.tree.map_with_path(
            lambda path, _: not flax.unused(".".join(str(entry.key) for entry in path)), params
        )
        optimizer = optax.masked(optax.adamw(rate, weight_decay=0.05), is_used)

        @jax.jit
        def step(params, state, x, labels):
            def loss(params):
                logits = nnx.merge(graphdef, params)(x)
                losses = [f(logits, labels) for f in (segmentation_loss.cross_entropy, segmentation_loss.dice_loss)]
                return sum(losses), logits

            (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value, logits, grads

        state, of_flax = optimizer.init(params), []
        for x, labels in batches:
            params, state, value, logits, grads = step(params, state, channels_last(x), jnp.asarray(labels))
            of_flax.append((float(value), np.asarray(logits), flatten(grads)))
        after = flatten(params)

    used = [parameter for name, parameter in twin.train().named_parameters() if not twin.unused(name)]
    of_torch = torch.optim.AdamW(used, lr=rate, weight_decay=0.05)
    for i, ((x, labels), (value, logits, grads)) in enumerate(zip(batches, of_flax, strict=True)):
        out = twin(torch.tensor(x))
        loss = torch_loss.cross_entropy(out, torch.tensor(labels)) + torch_loss.dice_loss(out, torch.tensor(labels))
        of_torch.zero_grad()
        loss.backward()
        of_torch.step()
        assert abs(value / loss.item() - 1) < 1e-9
        expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        assert {name for name in before if name not in expected} == set(filter(twin.unused, before))
        assert not any(grads[name].any() for name in before if name not in expected)
        if i == 0:
            assert error(logits, channels_last(out.detach().numpy())) <= OUTPUT_BOUND["float64"]
            errors = gradient_errors({name: grads[name] for name in expected}, expected)
            assert max(errors.values()) <= GRADIENT_BOUND["float64"], errors
    for name, parameter in twin.named_parameters():
        if twin.unused(name):
            np.testing.assert_array_equal(after[name], before[name])
        else:
            assert error(after[name], parameter) <= 1e-8
            assert np.abs(after[name] - before[name]).max() > 1e-4


@pytest.mark.parametrize("settings", [{"strides": (12, 24)}, {"decoder": "mask"}], ids=str)
def test_half_precision_returns_logits_of_float32(settings):
    config = small_segmenter(48, **settings)
    twin = perturb(torch_segmentation.CrossViTSegmenter(config))
    x = images(48).astype(np.float32)
    half = torch_segmentation.CrossViTSegmenter(config, dtype=torch.bfloat16).eval()
    half.load_state_dict(twin.state_dict())

    def build(rngs):
        return segmentation.CrossViTSegmenter(config, dtype=jnp.bfloat16, rngs=rngs)

    of_flax = nnx.jit(lambda model, x: model(x))(flax_module(build, twin.state_dict()), jnp.asarray(channels_last(x)))
    with torch.no_grad():
        want, of_torch = twin(torch.tensor(x)), half(torch.tensor(x))
    assert 0 < error(of_torch, want) < 0.05  # and float32, like the reference
    assert 0 < error(of_flax, channels_last(want.numpy())) < 0.05


def test_class_tokens_do_not_decay_and_new_parts_are_in_the_top_layer():
    settings = {"num_classes": 3, "decoder": "mask"}
    flax = nnx.eval_shape(lambda: segmentation.create_segmenter("ti", rngs=SameKey(), **settings))
    with torch.device("meta"):
        model = torch_segmentation.create_segmenter("ti", **settings)
    for twin in (flax, model):
        assert "decoder.cls_emb" in twin.no_weight_decay()
        assert twin.layer_of("decoder.cls_emb") == twin.layer_of("backbone.body.norm.1.weight")
        assert twin.is_head("decoder.mask_norm.bias")
    with pytest.raises(TypeError, match=r"rngs=nnx\.Rngs"):
        segmentation.create_segmenter("ti", num_classes=3)


def test_settings_of_the_computation_reach_the_body_and_the_decoder():
    model = nnx.eval_shape(
        lambda: segmentation.CrossViTSegmenter(small_segmenter(decoder="mask", num_blocks=1), rngs=SameKey())
    )
    model.set_attention("cudnn")
    model.set_forward_mode()
    model.set_grad_checkpointing()
    attentions = [module for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    assert len(attentions) == 3  # one in each branch, one in the decoder
    assert all(module.implementation == "cudnn" and module.forward_mode for module in attentions)
    assert all(stage.grad_checkpointing for stage in model.backbone.body.blocks)
    with pytest.raises(ValueError, match="implementation must be"):
        model.set_attention("fast")
