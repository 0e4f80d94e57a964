"""What the parity tests and the report share: perturbed weights, the three models, and the measure of error."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
from flax import nnx
from timm.models import pvt_v2
from timm.models.mobilevit import LinearSelfAttention

import crossvit_jax
import crossvit_torch
from convert.architecture import SameKey
from convert.tree import flatten, from_state_dict, nest
from crossvit_jax.blocks import Block, MultiScaleBlock
from crossvit_jax.config import TIMM_NAMES, VARIANTS, get_config
from crossvit_jax.patch_embed import PatchEmbed
from tests.compilation import QUICKLY

# largest error ÷ max|reference| that the house accepts
OUTPUT_BOUND = {"float32": 1e-5, "float64": 1e-11}
GRADIENT_BOUND = {"float32": 1e-5, "float64": 1e-10}
# A single parameter of a whole model: queries and keys of the cross-attentions have gradients so small that float32's
# rounding shows. On a CPU with AVX2, at 408 pixels, timm's are up to 1.2e-5 from float64 and ours 3.6e-5; with keys and
# values that are not folded into the query, ours would be 2.0e-5. A mistake is found in float64, where it cannot hide.
PARAMETER_BOUND = {"float32": 5e-5, "float64": 1e-10}
PRECISIONS = ["float32", "float64"]
GRADIENT_VARIANTS = ["ti", "9-dagger", "s", "15-dagger-408"]  # a gradient takes half a minute to compile
# what timm calls our settings
TIMM_SETTINGS = {"image_size": "img_size", "image_scale": "img_scale"}
TIMM_SETTINGS |= {name: name for name in ("in_chans", "num_classes", "global_pool", "crop_scale")}


def perturb(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter with noise around its usual start: fresh biases are 0 and norms 1, which would hide errors.

    Returns the module in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.05 * noise + is_norm)
    return module.eval()


def timm_model(variant: str, precision: str = "float64", **settings) -> torch.nn.Module:
    """timm's own model, perturbed; both precisions have the same weights. Settings have our names."""
    config = get_config(variant, **settings)
    settings = {timm_name: settings[name] for name, timm_name in TIMM_SETTINGS.items() if name in settings}
    if config.depth != VARIANTS[variant].depth or config.stages != VARIANTS[variant].stages:
        settings["depth"] = [[*config.depth, 0]] * config.stages
    with torch.device("meta"), _nothing_drawn():
        model = timm.create_model(TIMM_NAMES[variant], **settings)
    return perturb(model.to_empty(device="cpu")).to(getattr(torch, precision))


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """torch's and timm's initialisations, which take a second even without memory, are left out."""
    with (
        patch("timm.models.crossvit.trunc_normal_"),
        patch.object(torch.nn.Linear, "reset_parameters"),
        patch.object(torch.nn.Conv2d, "reset_parameters"),
    ):
        yield


class TimmSeparable(torch.nn.Module):
    """timm's separable attention of tokens (batch, tokens, dim), with its parameters under our names."""

    def __init__(self, dim: int, *, qkv_bias: bool = True):
        super().__init__()
        self.qkv = torch.nn.Linear(dim, 1 + 2 * dim, bias=qkv_bias)
        self.proj = torch.nn.Linear(dim, dim)
        self.timms = [LinearSelfAttention(dim)]  # whose own parameters are not this module's

    def forward(self, x, **kwargs):
        theirs = {"qkv_proj": self.qkv, "out_proj": self.proj}
        parameters = {f"{name}.weight": layer.weight[:, :, None, None] for name, layer in theirs.items()}
        # timm has both biases or none
        parameters["qkv_proj.bias"] = self.qkv.weight.new_zeros(len(self.qkv.weight))
        parameters |= {f"{name}.bias": layer.bias for name, layer in theirs.items() if layer.bias is not None}
        maps = x.transpose(1, 2)[:, :, None]
        return torch.func.functional_call(self.timms[0], parameters, maps)[:, :, 0].transpose(1, 2)


class TimmReduced(pvt_v2.Attention):
    """timm's attention over spatially reduced keys, and a class token, first of the tokens, that it does not know: it
    goes round the convolution and the norm, and is one more key."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, grid: tuple[int, int], *, qkv_bias: bool = True):
        super().__init__(dim, num_heads, sr_ratio, qkv_bias=qkv_bias)
        self.grid, self.norm.eps = grid, 1e-6

    def without_class_token(self, patches):
        return super().forward(patches, self.grid)

    def forward(self, x, **kwargs):
        squares = self.sr(x[:, 1:].transpose(1, 2).unflatten(2, self.grid))
        keys = torch.cat([x[:, :1], self.norm(squares.flatten(2).transpose(1, 2))], dim=1)
        k, v = self.kv(keys).chunk(2, dim=-1)
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), k, v))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class TimmReducedPatches(TimmReduced):
    """The same without a class token: nothing but timm's."""

    def forward(self, x, **kwargs):
        return self.without_class_token(x)


def torch_twin(variant: str, state_dict: dict, precision: str, **settings) -> crossvit_torch.CrossViT:
    """Our torch model with the weights given, loaded strictly."""
    with torch.device("meta"):  # its own initialisation takes seconds
        model = crossvit_torch.create_model(variant, param_dtype=getattr(torch, precision), **settings)
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model.eval()


def flax_twin(variant: str, state_dict: dict, precision: str, **settings) -> crossvit_jax.CrossViT:
    """Our Flax model with the weights given. For float64, call it inside `jax.enable_x64(True)`."""
    config = get_config(variant, **settings)
    return flax_module(
        lambda rngs: crossvit_jax.CrossViT(config, param_dtype=jnp.dtype(precision), rngs=rngs), state_dict
    )


def flax_module(build: Callable[[nnx.Rngs], nnx.Module], state_dict: dict) -> nnx.Module:
    """Any of our Flax modules with the weights of its torch twin."""
    module = nnx.eval_shape(lambda: build(SameKey()))
    params = jax.device_put(nest(from_state_dict(state_dict)), may_alias=False)  # torch may change its tensors
    nnx.replace_by_pure_dict(state := nnx.state(module, nnx.Param), params)
    nnx.update(module, state)
    module.eval()
    return module


def abstract(name: str, **settings) -> crossvit_jax.CrossViT:
    """Our Flax model with shapes instead of arrays."""
    return nnx.eval_shape(lambda: crossvit_jax.create_model(name, rngs=SameKey(), **settings))


def random_array(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers in float64; the same for every framework and precision."""
    return np.random.default_rng(seed).standard_normal(shape)


def images(size: int | tuple[int, int] = 240, batch: int = 2, channels: int = 3) -> np.ndarray:
    """Random images, channels first."""
    height, width = (size, size) if isinstance(size, int) else size
    return random_array(1, batch, channels, height, width)


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def error(result, reference, scale=None) -> float:
    """Largest absolute difference ÷ largest absolute value of the reference (or of `scale`)."""
    result, reference, scale = (
        x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        for x in (result, reference, reference if scale is None else scale)
    )
    assert result.dtype == reference.dtype, f"{result.dtype} against {reference.dtype}"
    assert result.shape == reference.shape, f"{result.shape} against {reference.shape}"
    assert np.isfinite(reference).all() and np.abs(scale).max() > 0
    return float(np.abs(result - reference).max() / np.abs(scale).max())


@dataclass
class Gradients:
    """Outputs of a model, and the gradients of Σ outputs · weights, the weights being fixed random numbers."""

    outputs: list
    inputs: list  # in torch's layout
    parameters: dict  # under timm's names and in torch's layouts


def torch_gradients(module: torch.nn.Module, inputs: list[np.ndarray], precision: str) -> Gradients:
    """Inputs and outputs are lists, also where the module takes and returns one tensor."""
    xs = [torch.tensor(x, dtype=getattr(torch, precision), requires_grad=True) for x in inputs]
    module.zero_grad()
    outs = module(xs) if len(xs) > 1 else [module(*xs)]
    weights = [torch.tensor(random_array(i, *out.shape), dtype=out.dtype) for i, out in enumerate(outs)]
    torch.autograd.backward(outs, weights)
    return Gradients(outs, [x.grad for x in xs], {name: p.grad for name, p in module.named_parameters()})


def flax_gradients(
    module: nnx.Module,
    inputs: list[np.ndarray],
    precision: str,
    compiler_options: dict | None = None,
    *,
    in_pieces: bool = False,
) -> Gradients:
    """The same for a Flax module; images are given channels first, as to torch. `in_pieces` is as in `flax_outputs`."""
    graphdef, params = nnx.split(module)

    def call(params, xs):
        xs = [x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for x in xs]
        module = nnx.merge(graphdef, params)
        return module(xs) if len(xs) > 1 else [module(*xs)]

    def run(params, xs):
        outs, vjp = jax.vjp(call, params, xs)
        return outs, *vjp([jnp.asarray(random_array(i, *out.shape), out.dtype) for i, out in enumerate(outs)])

    with _compiled(run, compiler_options, in_pieces) as compiled:
        outs, grads, grad_xs = compiled(params, [jnp.asarray(x, precision) for x in inputs])
    return Gradients(outs, grad_xs, flatten(grads))


def gradient_errors(result: dict, reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """The error of every parameter's gradient, each against the largest value in that parameter's own gradient.

    A cross-attention's key bias moves all scores of a head alike, so its gradient is zero, and what torch returns is
    rounding noise. It is measured against the gradient of the key weights beside it.
    """
    assert result.keys() == reference.keys()
    errors = {}
    for name, expected in reference.items():
        if not expected.any():  # nothing downstream reads it
            errors[name] = float(np.abs(np.asarray(result[name])).max())
            continue
        scale = reference[name.removesuffix("bias") + "weight"] if name.endswith("wk.bias") else expected
        errors[name] = error(result[name], expected, scale)
    return errors


def output_errors(
    variant: str,
    precision: str,
    size=None,
    batch: int = 2,
    compiler_options: dict | None = None,
    in_pieces: bool = False,
    **settings,
) -> dict[str, dict[str, float]]:
    """The errors of both twins against timm: of the logits, and of each branch's normalised tokens.

    `size` is that of the images, by default the model's. `in_pieces` is as in `flax_outputs`.
    """
    dtype = getattr(torch, precision)
    config = get_config(variant, **settings)
    x = images(size or config.image_size, batch, config.in_chans)
    reference = timm_model(variant, precision, **settings)
    twin = torch_twin(variant, reference.state_dict(), precision, **settings)
    with torch.no_grad():
        expected = timm_outputs(reference, torch.tensor(x, dtype=dtype))
        torch_result = [twin(torch.tensor(x, dtype=dtype)), *twin.forward_features(torch.tensor(x, dtype=dtype))]
    with jax.enable_x64(precision == "float64"):
        flax = flax_twin(variant, reference.state_dict(), precision, **settings)
        flax_result = flax_outputs(flax, x, precision, compiler_options, in_pieces=in_pieces)
    names = ("logits", "branch 0", "branch 1")
    return {
        twin_name: {name: error(r, e) for name, r, e in zip(names, result, expected, strict=True)}
        for twin_name, result in (("torch", torch_result), ("flax", flax_result))
    }


@contextmanager
def stages_run_once() -> Iterator[None]:
    """Both twins' logits and features come of the same stages, which are then computed once: for one input only."""
    with ExitStack() as stack:
        for package in (crossvit_jax, crossvit_torch):
            for owner, name in ((package.CrossViT, "_embed"), (package.blocks.MultiScaleBlock, "run_branches")):
                stack.enter_context(patch.object(owner, name, _once(getattr(owner, name))))
        yield


def _once(method: Callable) -> Callable:
    """What the method first returned, of each object."""
    results = {}

    def once(self, *args, **kwargs):
        if self not in results:
            results[self] = method(self, *args, **kwargs)
        return results[self]

    return once


def timm_outputs(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits and both branches' features, which timm computes on the way to them."""
    features, forward_features = [], model.forward_features
    model.forward_features = lambda x: features.extend(forward_features(x)) or features
    try:
        return [model(x), *features]
    finally:
        del model.forward_features  # the instance's own; the class's is back


def flax_outputs(
    model: crossvit_jax.CrossViT,
    x: np.ndarray,
    precision: str,
    compiler_options: dict | None = None,
    *,
    in_pieces: bool = False,
) -> list[jax.Array]:
    """Logits and both branches' features of images given channels first, in one compiled program.

    `in_pieces`: in several, which blocks of the same shapes share. A deep model is compiled in half the time.
    """
    graphdef, params = nnx.split(model)

    def run(params, x):
        model = nnx.merge(graphdef, params)
        return [model(x), *model.forward_features(x)]

    with _compiled(run, compiler_options, in_pieces) as compiled:
        return compiled(params, jnp.asarray(channels_last(x), precision))


# what a whole model does to images, but for scaling them and for joining the results
_PIECES = [(PatchEmbed, "__call__"), (Block, "__call__"), (MultiScaleBlock, "fuse")]
_PIECES += [(crossvit_jax.CrossViT, name) for name in ("_normalise", "_pool")]


@contextmanager
def _compiled(run: Callable, compiler_options: dict | None, in_pieces: bool) -> Iterator[Callable]:
    """The function compiled; or as it is, while the pieces of a model are compiled, each for its shapes."""
    with ExitStack() as stack:
        if not in_pieces:
            yield jax.jit(run, compiler_options=compiler_options)
            return
        assert compiler_options in (None, QUICKLY)  # jax takes none for what a gradient is taken of
        for owner, name in _PIECES:
            stack.enter_context(patch.object(owner, name, _piece(getattr(owner, name))))
        scale_image = jax.jit(crossvit_jax.crossvit.scale_image, static_argnums=(1, 2))
        stack.enter_context(patch.object(crossvit_jax.crossvit, "scale_image", scale_image))
        yield run


def _piece(method: Callable) -> Callable:
    @partial(jax.jit, static_argnums=(0, 1, 2))
    def run(graphdef, structure, settings, params, arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if setting is ... else setting for setting in settings]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return method(nnx.merge(graphdef, params), *args, **kwargs)

    def compiled(self, *args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        settings = tuple(... if isinstance(leaf, jax.Array) else leaf for leaf in leaves)
        graphdef, params = nnx.split(self)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        return run(graphdef, structure, settings, params, arrays)

    return compiled


def whole_gradient_errors(
    variant: str, precision: str, compiler_options: dict | None = None, *, in_pieces: bool = False, **settings
) -> tuple[float, dict[str, float]]:
    """The error of Flax's whole gradient against timm's, taken as one vector, and the errors of its parts.

    The parts are the parameters, see `gradient_errors`, and "images".
    """
    x = images(get_config(variant, **settings).image_size, batch=1)
    reference = timm_model(variant, precision, **settings)
    expected = torch_gradients(reference, [x], precision)
    with jax.enable_x64(precision == "float64"):
        model = flax_twin(variant, reference.state_dict(), precision, **settings)
        result = flax_gradients(model, [x], precision, compiler_options, in_pieces=in_pieces)
        parts = gradient_errors(result.parameters, expected.parameters)
        parts["images"] = error(result.inputs[0], expected.inputs[0])
    one_vector = [
        np.concatenate([np.asarray(gradients[name]).ravel() for name in expected.parameters])
        for gradients in (result.parameters, expected.parameters)
    ]
    return error(*one_vector), parts
