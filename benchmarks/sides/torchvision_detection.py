"""torchvision's FCOS around the PyTorch twin's backbone, and its training step: eager, or its networks compiled.

Its points are moved to the middles of patches, where ours are; all else is torchvision's, boxes and losses too.
"""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from benchmarks.task import CHECKED_STEPS, DetectionTask, Program, repeated
from convert import load_torch
from crossvit_torch.pyramid import PyramidBackbone

_THRESHOLDS = {"score_thresh": 0.05, "nms_thresh": 0.6, "detections_per_img": 100, "topk_candidates": 1000}


class _Backbone(nn.Module):
    """The levels by name, as torchvision wants them."""

    def __init__(self, backbone: PyramidBackbone, width: int):
        super().__init__()
        self.backbone, self.out_channels = backbone, width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(number), level) for number, level in enumerate(self.backbone(images)))


class _MiddleAnchors(AnchorGenerator):
    """Anchors around the middles of patches instead of their corners."""

    def grid_anchors(self, grid_sizes, strides):
        halves = [torch.stack([x, y, x, y]) / 2 for y, x in strides]
        return [a + half for a, half in zip(super().grid_anchors(grid_sizes, strides), halves, strict=True)]


def load(task: DetectionTask, side: str) -> Program:
    """The task's program, not compiled yet."""
    torch.set_float32_matmul_precision("highest")
    detector = load_torch(task.weights)
    model = _fcos(detector)
    images = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in task.images()]
    program = {"inference": _inference, "training": _training}[task.benchmark]
    optimizer = _optimizer(model, detector.no_weight_decay(), task)
    if side == "torchvision-compile":
        model.backbone.backbone = torch.compile(model.backbone.backbone)
        model.head = torch.compile(model.head)
    return program(task, model, images, optimizer)


def _fcos(detector: nn.Module) -> FCOS:
    """torchvision's detector with the twin's weights. It prepares images itself: here nothing is left to do."""
    config = detector.config
    sizes = tuple((stride,) for stride in config.strides)
    head = FCOSHead(config.width, 1, config.num_classes, config.num_convs)
    head.load_state_dict(detector.head.state_dict(), strict=True)
    return FCOS(
        _Backbone(detector.backbone, config.width),
        config.num_classes,
        anchor_generator=_MiddleAnchors(sizes, ((1.0,),) * len(sizes)),
        head=head,
        fixed_size=config.image_size[::-1],
        size_divisible=1,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        **_THRESHOLDS,
    )


def _facts() -> dict[str, str]:
    import torchvision

    threads = str(torch.get_num_threads())
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "torch threads": threads}


def _inference(task: DetectionTask, model: FCOS, images: list[Tensor], _: torch.optim.Optimizer) -> Program:
    model.eval()
    forward = torch.inference_mode()(lambda images: model(images))

    def check() -> dict[str, np.ndarray]:
        scores = np.zeros((len(images), _THRESHOLDS["detections_per_img"]), np.float32)
        for row, found in zip(scores, forward(images), strict=True):
            row[: len(found["scores"])] = found["scores"].numpy()
        return {"scores": scores}

    return Program(check, repeated(lambda: forward(images)), _facts())


def _optimizer(model: FCOS, no_weight_decay: set[str], task: DetectionTask) -> torch.optim.Optimizer:
    config = task.recipe()
    spared = {name.removeprefix("backbone.") for name in no_weight_decay}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name.removeprefix("backbone.backbone.") not in spared].append(parameter)
    decays = [
        {"params": groups[True], "weight_decay": config.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(decays, lr=config.peak_lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _training(task: DetectionTask, model: FCOS, images: list[Tensor], optimizer: torch.optim.Optimizer) -> Program:
    model.train()
    arrays = task.targets()
    targets = [
        {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(classes).long()}
        for boxes, classes in zip(arrays["boxes"], arrays["classes"], strict=True)
    ]

    def step() -> Tensor:
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def check() -> dict[str, np.ndarray]:
        return {"losses": np.array([step().item() for _ in range(CHECKED_STEPS)])}

    return Program(check, repeated(step), _facts())
