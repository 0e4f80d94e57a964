"""DINO: head, loss and centre against plain torch, crops at their own size, twenty steps of the twins."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.flatten_util import ravel_pytree
from torch import nn
from torch.nn import functional

from convert.tree import flatten
from crossvit_jax.pretraining import dino
from crossvit_torch.pretraining import dino as torch_dino
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    PRECISIONS,
    channels_last,
    error,
    flax_gradients,
    flax_module,
    gradient_errors,
    perturb,
    random_array,
    torch_gradients,
)
from tests.small_model import small_config

LOSS_BOUND = {"float32": 1e-6, "float64": 1e-12}
CONFIG = small_config(0)
PROTOTYPES, HIDDEN, BOTTLENECK = 10, 16, 8
SIZES = {"hidden": HIDDEN, "bottleneck": BOTTLENECK}


class Head(nn.Module):
    """DINO's head as its paper has it, of torch's own layers."""

    def __init__(self, dim):
        super().__init__()
        layers = [nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN, BOTTLENECK))
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(BOTTLENECK, PROTOTYPES, bias=False))

    def forward(self, x):
        return self.last_layer(functional.normalize(self.mlp(x), dim=-1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_head_is_torchs_layers_with_weight_norm_of_length_1(precision):
    reference = perturb(Head(12)).to(getattr(torch, precision))
    lengths, weight = "last_layer.parametrizations.weight.original0", "last_layer.parametrizations.weight.original1"
    reference.last_layer.parametrizations.weight.original0.data.fill_(1)
    twin = torch_dino.DinoHead(12, PROTOTYPES, **SIZES).to(getattr(torch, precision))

    def names(tensors):
        return {name.replace(weight, "last_layer.weight"): x for name, x in tensors.items() if name != lengths}

    twin.load_state_dict(names(reference.state_dict()), strict=True)
    x = [random_array(0, 6, 12)]
    expected, of_torch = torch_gradients(reference, x, precision), torch_gradients(twin, x, precision)
    with jax.enable_x64(precision == "float64"):
        model = flax_module(
            lambda rngs: dino.DinoHead(12, PROTOTYPES, **SIZES, param_dtype=precision, rngs=rngs), twin.state_dict()
        )
        of_flax = flax_gradients(model, x, precision)
    for result in (of_torch, of_flax):
        assert error(result.outputs[0], expected.outputs[0]) <= OUTPUT_BOUND[precision]
        assert error(result.inputs[0], expected.inputs[0]) <= GRADIENT_BOUND[precision]
        errors = gradient_errors(result.parameters, names(expected.parameters))
        assert max(errors.values()) <= GRADIENT_BOUND[precision], errors


def plain_loss(student, teacher, centre, student_temperature, teacher_temperature):
    """As the paper's algorithm 1 and its multi-crop have it: pair by pair."""
    losses = []
    for t, of_teacher in enumerate(teacher):
        targets = torch.softmax((of_teacher - centre) / teacher_temperature, dim=1)
        for s, of_student in enumerate(student):
            if s != t:
                log_shares = functional.log_softmax(of_student / student_temperature, dim=1)
                losses.append(-(targets * log_shares).sum(1).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_loss_gradient_and_centre_are_those_of_a_loop_over_the_pairs_of_crops(precision):
    dtype = getattr(torch, precision)
    arrays = [random_array(seed, crops, 3, PROTOTYPES) / 4 for seed, crops in enumerate((5, 2))]
    centre = random_array(3, PROTOTYPES) / 4
    student, teacher, middle = (torch.tensor(x, dtype=dtype) for x in (*arrays, centre))
    student.requires_grad_()
    expected = plain_loss(student, teacher, middle, 0.1, 0.07)
    (gradient,) = torch.autograd.grad(expected, student)
    next_centre = 0.9 * middle + 0.1 * torch.cat(list(teacher)).mean(0)

    of_torch = torch_dino.dino_loss(student, teacher, middle, teacher_temperature=0.07)
    assert abs(of_torch.item() / expected.item() - 1) <= LOSS_BOUND[precision]
    assert error(torch.autograd.grad(of_torch, student)[0], gradient) <= GRADIENT_BOUND[precision]
    assert error(torch_dino.next_centre(middle, teacher), next_centre) <= LOSS_BOUND[precision]

    with jax.enable_x64(precision == "float64"):
        student, teacher, middle = (jnp.asarray(x, precision) for x in (*arrays, centre))

        @jax.jit
        def run(student, teacher, middle):
            def loss(student, teacher):
                return dino.dino_loss(student, teacher, middle, teacher_temperature=0.07)

            value, grads = jax.value_and_grad(loss, (0, 1))(student, teacher)
            return value, grads, dino.next_centre(middle, teacher)

        value, (grad, of_teacher), moved = run(student, teacher, middle)
        assert abs(float(value) / expected.item() - 1) <= LOSS_BOUND[precision]
        assert error(grad, gradient) <= GRADIENT_BOUND[precision] and not of_teacher.any()
        assert error(moved, next_centre) <= LOSS_BOUND[precision]


def test_small_crops_have_the_tokens_of_their_own_size():
    twin = perturb(torch_dino.DinoCrossViT(CONFIG, PROTOTYPES, **SIZES))
    seen = []
    twin.body.norm[0].register_forward_hook(lambda module, args, x: seen.append(x.shape[1]))
    twin.body.norm[1].register_forward_hook(lambda module, args, x: seen.append(x.shape[1]))
    for side in (48, 24):
        twin(torch.zeros(1, 3, side, side))
    assert seen == [1 + 16, 1 + 4, 1 + 4, 1 + 1]  # resized up, the small crop would have as many as the large one
    with pytest.raises(ValueError, match="does not divide into whole patches"):
        twin(torch.zeros(1, 3, 36, 36))
    model = flax_module(lambda rngs: dino.DinoCrossViT(CONFIG, PROTOTYPES, **SIZES, rngs=rngs), twin.state_dict())
    x = random_array(1, 2, 3, 24, 24).astype(np.float32)
    of_flax = nnx.jit(lambda model, x: model.body.forward_features(x, own_size=True))(
        model, jnp.asarray(channels_last(x))
    )
    assert [y.shape for y in of_flax] == [(2, 5, 12), (2, 2, 24)]
    # a model of that size with resampled positions is the same
    small = copy.deepcopy(twin.body)
    small.config = CONFIG.replace(image_size=24)
    for i in range(2):
        resampled = resampled_by_timm(
            getattr(twin.body, f"pos_embed_{i}"), CONFIG.grid_size[i], small.config.grid_size[i]
        )
        setattr(small, f"pos_embed_{i}", nn.Parameter(resampled))
    with torch.no_grad():
        of_torch, expected = (
            twin.body.forward_features(torch.tensor(x), own_size=True),
            small.forward_features(torch.tensor(x)),
        )
    for one, other, want in zip(of_flax, of_torch, expected, strict=True):
        assert error(one, want) <= OUTPUT_BOUND["float32"] and error(other, want) <= OUTPUT_BOUND["float32"]


def resampled_by_timm(embedding, grid, new_grid):
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(embedding, list(new_grid), list(grid), num_prefix_tokens=1)


def test_twenty_steps_in_float64_end_at_the_twins_weights_teacher_and_centre():
    rate, count, batch = 1e-3, 20, 3
    twin = perturb(torch_dino.DinoCrossViT(CONFIG, PROTOTYPES, **SIZES)).double()
    before = {name: tensor.numpy().copy() for name, tensor in twin.state_dict().items()}
    crops = [random_array(i, 2, batch, 3, 48, 48) for i in range(count)]
    momenta = [dino.cosine_between(0.9, 1.0, i / count) for i in range(count)]

    with jax.enable_x64(True):

        def build(rngs):
            return dino.DinoCrossViT(CONFIG, PROTOTYPES, **SIZES, param_dtype=jnp.float64, rngs=rngs)

        graphdef, state = nnx.split(flax_module(build, twin.state_dict()))
        student, tree = ravel_pytree(nnx.to_pure_dict(state))  # as one vector, which takes less compiling
        optimizer = optax.adamw(rate, weight_decay=0.05)

        @jax.jit
        def run(vector, x, said, centre):
            """Loss and gradient where the teacher says that, and what a model with these parameters says itself."""

            def loss(vector):
                own = nnx.merge(graphdef, tree(vector))(x.reshape(-1, *x.shape[2:])).reshape(said.shape)
                return dino.dino_loss(own, said, centre), own

            (value, own), grads = jax.value_and_grad(loss, has_aux=True)(vector)
            return value, grads, own

        @jax.jit
        def step(student, teacher, centre, state, grads, said, momentum):
            updates, state = optimizer.update(grads, state, student)
            student = optax.apply_updates(student, updates)
            return student, dino.next_teacher(teacher, student, momentum), dino.next_centre(centre, said), state

        teacher, centre, state, of_flax = student, jnp.zeros(PROTOTYPES), optimizer.init(student), []
        for x, momentum in zip(crops, momenta, strict=True):
            x = np.ascontiguousarray(x.transpose(0, 1, 3, 4, 2))
            *_, said = run(teacher, x, np.zeros((2, batch, PROTOTYPES)), centre)
            value, grads, _ = run(student, x, said, centre)
            student, teacher, centre, state = step(student, teacher, centre, state, grads, said, momentum)
            of_flax.append((float(value), flatten(tree(grads))))
        after, taught = flatten(tree(student)), flatten(tree(teacher))

    of_torch = torch.optim.AdamW(twin.parameters(), lr=rate, weight_decay=0.05)
    guide, middle = copy.deepcopy(twin), torch.zeros(PROTOTYPES, dtype=torch.float64)
    for i, (x, momentum, (value, grads)) in enumerate(zip(crops, momenta, of_flax, strict=True)):
        x = torch.tensor(x)
        with torch.no_grad():
            said = guide(x.flatten(0, 1)).reshape(2, batch, -1)
        loss = torch_dino.dino_loss(twin(x.flatten(0, 1)).reshape(2, batch, -1), said, middle)
        of_torch.zero_grad()
        loss.backward()
        if i == 0:
            errors = gradient_errors(grads, {name: p.grad for name, p in twin.named_parameters()})
            assert max(errors.values()) <= GRADIENT_BOUND["float64"], errors
        of_torch.step()
        torch_dino.next_teacher(guide, twin, momentum)
        middle = torch_dino.next_centre(middle, said)
        assert abs(value / loss.item() - 1) < 1e-9
    assert error(centre, middle) <= 1e-8
    for (name, parameter), old in zip(twin.named_parameters(), guide.parameters(), strict=True):
        assert error(after[name], parameter) <= 1e-8 and error(taught[name], old) <= 1e-8
        assert np.abs(after[name] - before[name]).max() > 1e-4 or "wk.bias" in name


def test_schedules_and_what_does_not_decay():
    assert [dino.cosine_between(0.996, 1.0, x) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.996, 0.998, 1])
    assert float(dino.cosine_between(2.0, 4.0, jnp.float32(0.25))) == pytest.approx(
        torch_dino.cosine_between(2.0, 4.0, 0.25)
    )
    twin = torch_dino.DinoCrossViT(CONFIG, PROTOTYPES, **SIZES)
    assert {"head.last_layer.weight", "body.pos_embed_0"} <= twin.no_weight_decay()
    with torch.no_grad():
        half = torch_dino.DinoCrossViT(CONFIG, PROTOTYPES, **SIZES, dtype=torch.bfloat16).eval()
        assert half(torch.zeros(1, 3, 48, 48)).dtype == torch.float32
