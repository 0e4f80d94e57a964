"""torchvision's FCOS around the PyTorch twin's backbone, and its training step: eager, or its networks compiled.

Its points are moved to the middles of patches, where ours are; all else is torchvision's, boxes and losses too.
"""

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from benchmarks.sides.timm import adamw, device_of, facts, set_up
from benchmarks.task import CHECKED_STEPS, DetectionTask, Program, repeated
from convert import load_torch
from crossvit_torch import CrossViTDetector


def load(task: DetectionTask, side: str) -> Program:
    """The task's program, not compiled yet."""
    set_up()
    detector, is_training = load_torch(task.weights), task.benchmark == "training"
    model = _fcos(detector).train(is_training)
    optimizer = adamw(detector, task.recipe(), detector.no_weight_decay())
    if side == "torchvision-compile":
        model.backbone.compile()
        model.head.compile()
    images = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in task.images()]
    boxes, classes, _ = (torch.from_numpy(array) for array in task.targets().values())
    targets = [{"boxes": rows, "labels": labels.long()} for rows, labels in zip(boxes, classes, strict=True)]
    detect = torch.inference_mode()(lambda: model(images))

    def step() -> Tensor:
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def check() -> dict[str, np.ndarray]:
        if is_training:
            return {"losses": np.array([step().item() for _ in range(CHECKED_STEPS)])}
        return task.found([{name: array.numpy() for name, array in found.items()} for found in detect()])

    told = facts(device_of(task)) | {"torchvision": torchvision.__version__}
    return Program(check, repeated(step if is_training else detect), told)


class _MiddleAnchors(AnchorGenerator):
    """Anchors around the middles of patches instead of their corners."""

    def grid_anchors(self, grid_sizes, strides):
        halves = [torch.stack([x, y, x, y]) / 2 for y, x in strides]
        return [a + half for a, half in zip(super().grid_anchors(grid_sizes, strides), halves, strict=True)]


def _fcos(detector: CrossViTDetector) -> FCOS:
    """torchvision's detector with the twin's backbone, and a head of its own, which becomes the twin's as well."""
    config, backbone = detector.config, detector.backbone
    head = FCOSHead(config.width, 1, config.num_classes, config.num_convs)
    head.load_state_dict(detector.head.state_dict(), strict=True)
    detector.head, backbone.out_channels = head, config.width
    backbone.register_forward_hook(lambda module, images, levels: dict(enumerate(levels)))  # as torchvision has them
    anchors = _MiddleAnchors(tuple((stride,) for stride in config.strides), ((1.0,),) * len(config.strides))
    # it would resize, pad and normalise images: here nothing is left to do
    prepared = {"fixed_size": config.image_size[::-1], "size_divisible": 1, "image_mean": [0.0] * 3}
    settings = prepared | {"image_std": [1.0] * 3, "score_thresh": 0.05}
    return FCOS(backbone, config.num_classes, anchor_generator=anchors, head=head, **settings)
