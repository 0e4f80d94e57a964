"""Detection: head, losses, matched boxes, decoding and suppression against torchvision's FCOS; then the twins whole."""

from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList

from convert.architecture import SameKey
from convert.tree import flatten
from crossvit_jax import boxes as flax_boxes
from crossvit_jax import detection, detection_loss
from crossvit_jax.config import DetectorConfig
from crossvit_torch import boxes as torch_boxes
from crossvit_torch import detection as torch_detection
from crossvit_torch import detection_loss as torch_loss
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
from tests.small_model import small_detector

LOSS_BOUND = {"float32": 1e-6, "float64": 1e-12}
CLASSES = 3
EMBEDDED = {"distances": (24, 48)}
NAMES = ("cls_logits", "bbox_regression", "bbox_ctrness")


class MiddleAnchors(AnchorGenerator):
    """Anchors around the middles of patches instead of their corners."""

    def grid_anchors(self, grid_sizes, strides):
        anchors = super().grid_anchors(grid_sizes, strides)
        halves = [torch.stack([x, y, x, y]) / 2 for y, x in strides]
        return [a + half for a, half in zip(anchors, halves, strict=True)]


class Backbone(torch.nn.Module):
    """A backbone as torchvision wants it: levels by name."""

    def __init__(self, levels: torch.nn.Module | None, width: int):
        super().__init__()
        self.levels, self.out_channels = levels, width

    def forward(self, x: torch.Tensor) -> OrderedDict:
        return OrderedDict((str(i), level) for i, level in enumerate(self.levels(x)))


def torchvision_fcos(config: DetectorConfig, levels: torch.nn.Module | None = None, offset: float = 0.5, **settings):
    """torchvision's detector on the levels, perturbed."""
    sizes = tuple((stride,) for stride in config.strides)
    anchors = (MiddleAnchors if offset else AnchorGenerator)(sizes, ((1.0,),) * len(sizes))
    size = {"fixed_size": config.image_size[::-1], "size_divisible": 1, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    head = perturb(FCOSHead(config.width, 1, config.num_classes, config.num_convs))
    backbone = Backbone(levels, config.width)
    return FCOS(backbone, config.num_classes, anchor_generator=anchors, head=head, **size, **settings)


def anchors_of(fcos: FCOS, config: DetectorConfig, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    sizes = [config.image_size] * batch
    features = [torch.zeros(batch, 1, *grid, dtype=dtype) for grid in config.level_grids]
    return fcos.anchor_generator(ImageList(torch.zeros(batch, 3, *config.image_size, dtype=dtype), sizes), features)


def some_targets(config: DetectorConfig, counts=(6, 3, 0), rows: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Random boxes of all sizes, whose areas differ enough for torchvision's float32; rows are filled up with NaN."""
    rng = np.random.default_rng(seed)
    height, width = config.image_size
    boxes = np.full((len(counts), rows, 4), np.nan, np.float32)
    for row, count in zip(boxes, counts, strict=True):
        shares = np.geomspace(0.95, 0.08, count)[:, None] * rng.uniform(0.85, 1, (count, 2))
        sides = shares * [width, height]
        first = rng.uniform(size=(count, 2)) * ([width, height] - sides)
        row[:count] = np.concatenate([first, first + sides], axis=1)
        areas = np.sort(sides.prod(1))
        assert (np.diff(areas) > 16).all()
    present = np.arange(rows) < np.array(counts)[:, None]
    classes = np.where(present, rng.integers(0, config.num_classes, (len(counts), rows)), 0).astype(np.int32)
    return {"boxes": boxes, "classes": classes, "present": present}


def some_outputs(config: DetectorConfig, batch: int, seed: int = 3) -> dict[str, np.ndarray]:
    points = sum(rows * columns for rows, columns in config.level_grids)
    widths = {"cls_logits": config.num_classes, "bbox_regression": 4, "bbox_ctrness": 1}
    arrays = {name: random_array(seed + i, batch, points, width) for i, (name, width) in enumerate(widths.items())}
    return arrays | {"bbox_regression": np.abs(arrays["bbox_regression"]) * 2}


def torchvision_targets(targets: dict[str, np.ndarray], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    return [
        {"boxes": torch.tensor(boxes[present]).to(dtype), "labels": torch.tensor(classes[present]).long()}
        for boxes, classes, present in zip(*targets.values(), strict=True)
    ]


def torchvision_losses(fcos: FCOS, config: DetectorConfig, outputs: dict, targets: dict) -> tuple[dict, torch.Tensor]:
    """The losses, and the box that each point was matched with.

    torchvision has its distances fixed, at 4 and 8 times the size of an anchor. Anchors of another size, and a radius
    in proportion, share boxes out to the levels by other distances; the losses then get the anchors as they are.
    """
    dtype = outputs["cls_logits"].dtype
    anchors = anchors_of(fcos, config, len(targets["boxes"]), dtype)
    ratio = config.distances[0] / (8 * config.strides[0])
    half = ratio * (anchors[0][:, 2:] - anchors[0][:, :2]) / 2
    middle = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2
    shrunk = [torch.cat([middle - half, middle + half], dim=1) for _ in anchors]
    fcos.center_sampling_radius = 1.5 / ratio
    compute_loss, matched = fcos.head.compute_loss, []

    def record(targets, outputs, _, matched_idxs):
        matched.extend(matched_idxs)
        return compute_loss(targets, outputs, anchors, matched_idxs)

    fcos.head.compute_loss = record
    counts = [rows * columns for rows, columns in config.level_grids]
    losses = fcos.compute_loss(torchvision_targets(targets, dtype), outputs, shrunk, counts)
    del fcos.head.compute_loss
    return losses, torch.stack(matched)


# --- the parts ---


class ListHead(detection.FCOSHead):
    """What `flax_gradients` takes: outputs in a list."""

    def __call__(self, levels):
        return list(super().__call__(levels).values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_head_is_torchvisions_with_its_names(precision):
    levels = [random_array(i, 2, 64, *grid) for i, grid in enumerate([(6, 4), (3, 2)])]
    reference = perturb(FCOSHead(64, 1, CLASSES, num_convs=2)).to(getattr(torch, precision))
    twin = torch_detection.FCOSHead(64, CLASSES, 2, param_dtype=getattr(torch, precision))
    twin.load_state_dict(reference.state_dict(), strict=True)
    for module in (reference, twin):
        module.register_forward_hook(lambda module, args, outputs: list(outputs.values()))
    expected = torch_gradients(reference, levels, precision)
    result = torch_gradients(twin, levels, precision)
    with jax.enable_x64(precision == "float64"):
        build = lambda rngs: ListHead(64, CLASSES, 2, param_dtype=precision, rngs=rngs)  # noqa: E731
        own = flax_gradients(flax_module(build, twin.state_dict()), levels, precision)
    for got in (result, own):
        for result_, reference_ in zip(got.outputs, expected.outputs, strict=True):
            assert error(result_, reference_) <= OUTPUT_BOUND[precision]
        for result_, reference_ in zip(got.inputs, expected.inputs, strict=True):
            assert error(result_, reference_) <= GRADIENT_BOUND[precision]
        errors = gradient_errors(got.parameters, expected.parameters)
        assert max(errors.values()) <= GRADIENT_BOUND[precision], errors


def test_fresh_heads_start_as_torchvisions_do():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference, twin = FCOSHead(256, 1, CLASSES), torch_detection.FCOSHead(256, CLASSES, 4)
    flax = flatten(detection.FCOSHead(256, CLASSES, 4, rngs=nnx.Rngs(0)))
    for name, expected in reference.state_dict().items():
        for got in (twin.state_dict()[name], torch.tensor(flax[name])):
            assert got.shape == expected.shape
            assert abs(got.mean() - expected.mean()) < 1e-3
            assert abs(got.std(correction=0) - expected.std(correction=0)) < 1e-3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("settings", [{}, EMBEDDED], ids=["torchvisions-distances", "embedded-distances"])
@pytest.mark.parametrize("offset", [0.0, 0.5], ids=["corners", "middles"])
def test_losses_gradients_and_matched_boxes_equal_torchvisions(offset, settings, precision):
    config = small_detector((144, 240), **{"strides": (6, 12, 24)} | settings)
    dtype = getattr(torch, precision)
    targets, outputs = some_targets(config), some_outputs(config, 3)
    tensors = {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in outputs.items()}
    expected, matched = torchvision_losses(torchvision_fcos(config, offset=offset), config, tensors, targets)
    grads = torch.autograd.grad(sum(expected.values()), list(tensors.values()))
    of_levels = np.split(matched.numpy() >= 0, np.cumsum([r * c for r, c in config.level_grids])[:-1], axis=1)
    assert all(level.any() for level in of_levels), "every level must have boxes"

    torch_targets = {name: torch.tensor(x) for name, x in targets.items()}
    points = torch_boxes.make_points(config, dtype, offset=offset)
    boxes = torch_targets["boxes"].to(dtype)
    assert torch.equal(torch_loss.assign(points, boxes, torch_targets["present"]).long(), matched)
    result = torch_loss.detection_losses(tensors, torch_targets, points)
    own_grads = torch.autograd.grad(sum(result.values()), list(tensors.values()))

    with jax.enable_x64(precision == "float64"):
        arrays = {name: jnp.asarray(x, precision) for name, x in outputs.items()}
        points = flax_boxes.make_points(config, np.dtype(precision), offset=offset)

        on_device = jax.tree.map(jnp.asarray, targets)

        @jax.jit
        def run(outputs):
            def total(outputs):
                losses = detection_loss.detection_losses(outputs, on_device, points)
                return sum(losses.values()), losses

            (_, losses), grads = jax.value_and_grad(total, has_aux=True)(outputs)
            return (
                losses,
                grads,
                detection_loss.assign(points, on_device["boxes"].astype(precision), on_device["present"]),
            )

        losses, flax_grads, flax_matched = run(arrays)
    np.testing.assert_array_equal(flax_matched, matched)
    for name, want in expected.items():
        for got in (result[name], losses[name]):
            assert error(got, want) <= LOSS_BOUND[precision], name
    for name, got, want in zip(NAMES, own_grads, grads, strict=True):
        assert error(got, want) <= GRADIENT_BOUND[precision], name
        assert error(flax_grads[name], want) <= GRADIENT_BOUND[precision], name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("offset", "threshold", "candidates"), [(0.0, 0.2, 1000), (0.5, 0.5, 1000), (0.5, 0.05, 100), (0.5, 0.82, 1000)]
)
def test_the_same_boxes_are_kept_in_the_same_order_as_by_torchvision(offset, threshold, candidates, precision):
    config = small_detector((96, 144))
    dtype = getattr(torch, precision)
    outputs = some_outputs(config, 2)
    tensors = {name: torch.tensor(x, dtype=dtype) for name, x in outputs.items()}
    fcos = torchvision_fcos(config, offset=offset, score_thresh=threshold, topk_candidates=candidates)
    counts = [rows * columns for rows, columns in config.level_grids]
    anchors = [list(a.split(counts)) for a in anchors_of(fcos, config, 2, dtype)]
    split = {name: list(x.split(counts, dim=1)) for name, x in tensors.items()}
    expected = fcos.postprocess_detections(split, anchors, [config.image_size] * 2)
    assert all(0 < len(found["boxes"]) < 100 for found in expected) == (threshold > 0.8)

    how = {"score_threshold": threshold, "candidates": candidates}
    points = torch_boxes.make_points(config, dtype, offset=offset)
    of_torch = torch_detection.detections_of(tensors, points, config.image_size, **how)
    with jax.enable_x64(precision == "float64"):
        points = flax_boxes.make_points(config, np.dtype(precision), offset=offset)
        find = jax.jit(partial(detection.detections_of, points=points, size=config.image_size, **how))
        of_flax = find({name: jnp.asarray(x, precision) for name, x in outputs.items()})
    for result in (of_torch, of_flax):
        for i, want in enumerate(expected):
            valid = np.asarray(result["valid"][i])
            assert valid.shape == (100,) and valid.sum() == len(want["boxes"])
            np.testing.assert_array_equal(np.asarray(result["labels"][i])[valid], want["labels"])
            assert error(np.asarray(result["boxes"][i])[valid], want["boxes"]) <= OUTPUT_BOUND[precision]
            assert error(np.asarray(result["scores"][i])[valid], want["scores"]) <= OUTPUT_BOUND[precision]
            assert not any(np.asarray(result[name][i])[~valid].any() for name in ("boxes", "scores", "labels"))


def test_boxes_come_back_from_their_distances():
    config = small_detector()
    points = torch_boxes.make_points(config, torch.float64)
    distances = torch.rand(len(points.xy), 4, dtype=torch.float64)
    boxes = torch_boxes.decode(points.xy, points.stride, distances)
    torch.testing.assert_close(torch_boxes.encode(points.xy, points.stride, boxes), distances, rtol=1e-12, atol=1e-12)
    assert points.xy[0].tolist() == [3, 3] and points.xy[-1].tolist() == [24, 24]
    flax = flax_boxes.make_points(config, np.float64)
    for got, want in zip(flax, points, strict=True):
        np.testing.assert_array_equal(got, want)


# --- what training relies on ---


def test_parts_of_a_batch_have_its_loss_when_positives_were_counted_over_the_whole():
    config = small_detector((96, 144))
    targets, outputs = some_targets(config, (6, 3, 0, 5)), some_outputs(config, 4)
    with jax.enable_x64():
        points = flax_boxes.make_points(config, np.dtype("float64"))
        batch = jax.tree.map(jnp.asarray, (outputs, targets))
        positives = detection_loss.mean_positives(points, batch[1])
        losses = jax.jit(
            lambda outputs, targets, positives: detection_loss.detection_losses(outputs, targets, points, positives)
        )
        whole = losses(*batch, positives)
        halves = [
            losses(*jax.tree.map(lambda x, half=half: x[half], (*batch, positives)))
            for half in (slice(0, 2), slice(2, 4))
        ]
    alone = torch_loss.detection_losses(
        {name: torch.tensor(x) for name, x in outputs.items()},
        {name: torch.tensor(x) for name, x in targets.items()},
        torch_boxes.make_points(config, torch.float64),
    )
    for name, loss in whole.items():
        assert abs(float(loss) / float(alone[name]) - 1) < 1e-12
        assert abs(float(halves[0][name] + halves[1][name]) / 2 / float(loss) - 1) < 1e-12


def test_images_without_boxes_teach_that_there_is_none():
    config = small_detector()
    targets, outputs = jax.tree.map(jnp.asarray, some_targets(config, (0, 0))), some_outputs(config, 2)
    points = flax_boxes.make_points(config)
    total = lambda outputs: sum(detection_loss.detection_losses(outputs, targets, points).values())  # noqa: E731
    loss, grads = jax.jit(jax.value_and_grad(total))({k: jnp.asarray(x, jnp.float32) for k, x in outputs.items()})
    assert np.isfinite(loss) and (grads["cls_logits"] > 0).all()
    assert not grads["bbox_regression"].any() and not grads["bbox_ctrness"].any()


def test_names_tell_layers_decay_and_what_is_new():
    with torch.device("meta"):
        model = torch_detection.create_detector("ti", num_classes=CLASSES)
    flax = nnx.eval_shape(lambda: detection.create_detector("ti", num_classes=CLASSES, rngs=SameKey()))
    assert model.no_weight_decay() == flax.no_weight_decay() and "backbone.body.cls_token_0" in model.no_weight_decay()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    for twin in (model, flax):
        top = twin.layer_of("head.regression_head.bbox_reg.weight")
        assert top == twin.layer_of("backbone.pyramid.fuse.weight") == twin.layer_of("backbone.body.norm.0.weight")
        assert twin.layer_of("backbone.body.patch_embed.0.proj.weight") == 0
        assert 0 < twin.layer_of("backbone.body.blocks.2.blocks.1.3.attn.qkv.weight") < top
        assert twin.is_head("head.x") and twin.is_head("backbone.pyramid.fuse.bias")
        assert not twin.is_head("backbone.body.blocks.0.x")


# --- whole models ---


def whole_models(config: DetectorConfig) -> tuple[torch.nn.Module, nnx.Module]:
    """Perturbed twins in float64."""
    twin = perturb(torch_detection.CrossViTDetector(config)).double()
    build = lambda rngs: detection.CrossViTDetector(config, param_dtype=jnp.float64, rngs=rngs)  # noqa: E731
    return twin, flax_module(build, twin.state_dict())


def test_the_whole_detector_equals_torchvisions_around_the_same_backbone():
    config = small_detector((48, 96))  # whose levels are whole: torchvision finds a stride by dividing
    x = images(config.image_size)
    targets = some_targets(config, (4, 2))
    with jax.enable_x64():
        twin, flax = whole_models(config)
        fcos = torchvision_fcos(config, twin.backbone, score_thresh=0.3).double()
        fcos.head.load_state_dict(twin.head.state_dict(), strict=True)
        expected = fcos.eval()(list(torch.tensor(x)))
        found = {"torch": twin.detect(torch.tensor(x), score_threshold=0.3)}
        detect = nnx.jit(lambda model, x: (model(x), model.detect(x, score_threshold=0.3)))
        outputs, found["flax"] = detect(flax, jnp.asarray(channels_last(x)))
    with torch.no_grad():
        for name, want in twin(torch.tensor(x)).items():
            assert error(outputs[name], want) <= OUTPUT_BOUND["float64"]
    for result in found.values():
        for i, want in enumerate(expected):
            valid = np.asarray(result["valid"][i])
            assert valid.sum() == len(want["boxes"]) > 5
            assert error(np.asarray(result["boxes"][i])[valid], want["boxes"]) <= OUTPUT_BOUND["float64"]
            np.testing.assert_array_equal(np.asarray(result["labels"][i])[valid], want["labels"])
    losses = fcos.train()(list(torch.tensor(x)), torchvision_targets(targets, torch.float64))
    points = torch_boxes.make_points(config, torch.float64)
    own = torch_loss.detection_losses(
        twin(torch.tensor(x)), {name: torch.tensor(value) for name, value in targets.items()}, points
    )
    for name, want in losses.items():
        assert error(own[name], want) <= LOSS_BOUND["float64"]


def test_training_steps_of_the_twins_end_at_the_same_weights_and_leave_the_unused_ones_alone():
    config = small_detector(width=64)  # in groups of two: alone, a channel's bias would be normalised away
    rate, decay, steps = 1e-3, 0.05, 20
    batches = [(random_array(i, 2, 3, 48, 48), some_targets(config, (4, 2), seed=i)) for i in range(steps)]
    with jax.enable_x64():
        twin, flax = whole_models(config)
        before = {name: x.numpy().copy() for name, x in twin.state_dict().items()}
        graphdef, params = nnx.split(flax)
        points = flax_boxes.make_points(config, np.dtype("float64"))
        is_used = jax.tree.map_with_path(
            lambda path, _: not flax.unused(".".join(str(entry.key) for entry in path)), nnx.to_pure_dict(params)
        )
        optimizer = optax.masked(optax.adamw(rate, weight_decay=decay), is_used)

        @jax.jit
        def step(params, state, x, targets):
            def loss(params):
                outputs = nnx.merge(graphdef, params)(x)
                return sum(detection_loss.detection_losses(outputs, targets, points).values())

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value, grads

        params = nnx.to_pure_dict(params)
        state, of_flax = optimizer.init(params), []
        for x, targets in batches:
            params, state, value, grads = step(params, state, channels_last(x), targets)
            of_flax.append((float(value), flatten(grads)))
        after = flatten(params)

    twin.train()
    used = [parameter for name, parameter in twin.named_parameters() if not twin.unused(name)]
    of_torch = torch.optim.AdamW(used, lr=rate, weight_decay=decay)
    points = torch_boxes.make_points(config, torch.float64)
    for (x, targets), (value, grads) in zip(batches, of_flax, strict=True):
        targets = {name: torch.tensor(array) for name, array in targets.items()}
        loss = sum(torch_loss.detection_losses(twin(torch.tensor(x)), targets, points).values())
        of_torch.zero_grad()
        loss.backward()
        of_torch.step()
        assert abs(value / loss.item() - 1) < 1e-9
        expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        assert not any(grad.any() for name, grad in grads.items() if name not in expected)
        if x is batches[0][0]:
            errors = gradient_errors({name: grads[name] for name in expected}, expected)
            assert max(errors.values()) <= GRADIENT_BOUND["float64"], errors
    for name, parameter in twin.named_parameters():
        if twin.unused(name):
            np.testing.assert_array_equal(after[name], before[name])
            np.testing.assert_array_equal(parameter.detach(), before[name])
        else:
            assert error(after[name], parameter) <= 1e-8
            assert np.abs(after[name] - before[name]).max() > 1e-4
    assert sum(map(twin.unused, before)) == 36


def test_half_precision_computes_boxes_and_logits_in_float32():
    config = small_detector((48, 48))
    twin = perturb(torch_detection.CrossViTDetector(config))
    x = images(48).astype(np.float32)
    half = torch_detection.CrossViTDetector(config, dtype=torch.bfloat16).eval()
    half.load_state_dict(twin.state_dict())
    build = lambda rngs: detection.CrossViTDetector(config, dtype=jnp.bfloat16, rngs=rngs)  # noqa: E731
    of_flax = nnx.jit(lambda model, x: model(x))(flax_module(build, twin.state_dict()), jnp.asarray(channels_last(x)))
    with torch.no_grad():
        expected, of_torch = twin(torch.tensor(x)), half(torch.tensor(x))
    for name, want in expected.items():
        for got in (of_torch[name], of_flax[name]):
            assert 0 < error(got, want) < 0.05, name  # and float32, like the reference


def test_images_of_another_size_are_refused():
    config = small_detector((48, 72))
    model = torch_detection.CrossViTDetector(config)
    with pytest.raises(ValueError, match="images must be 48 x 72 pixels, as the model's; got 72 x 48"):
        model(torch.zeros(1, 3, 72, 48))
    flax = nnx.eval_shape(lambda: detection.CrossViTDetector(config, rngs=SameKey()))
    with pytest.raises(ValueError, match="images must be 48 x 72 pixels, as the model's; got 72 x 48"):
        jax.eval_shape(lambda x: flax(x), jax.ShapeDtypeStruct((1, 72, 48, 3), jnp.float32))


def test_fresh_weights_need_rngs():
    with pytest.raises(TypeError, match=r"rngs=nnx\.Rngs"):
        detection.create_detector("ti", num_classes=2)
