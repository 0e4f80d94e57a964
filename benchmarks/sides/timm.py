"""timm's model and the training step of timm's train.py: eager, and compiled."""

import dataclasses

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.sides.peak import PRODUCT, peak_flops
from benchmarks.task import CHECKED_STEPS, ModelTask, Program, repeated
from crossvit_jax.config import TIMM_NAMES
from train.config import TrainConfig


def load(task: ModelTask, side: str) -> Program:
    """The task's program, not compiled yet: eager, or on the side `timm-compile` compiled.

    CUDA graphs (`reduce-overhead`) are no side: where batches fill a GPU, it does not wait for launches. Nor is
    `max-autotune`: to compile takes longer than all the rest.
    """
    set_up()
    program = {"inference": _inference, "training": _training}[task.benchmark](task, compiled=side == "timm-compile")
    if side == "timm":
        float32 = (lambda: _float32_check(task)) if task.dtype == "bfloat16" else None
        program = dataclasses.replace(program, peak_flops=lambda: _peak_flops(task), float32=float32)
    # the cache is none on a CPU
    peak = torch.cuda.max_memory_allocated if task.device == "gpu" else program.peak_bytes
    return dataclasses.replace(program, rest=torch.cuda.empty_cache, peak_bytes=peak)


def set_up() -> None:
    """The fastest convolutions that cuDNN has; but in float32 none that round to TF32, torch's default for them."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def _inference(task: ModelTask, *, compiled: bool) -> Program:
    dtype, device = getattr(torch, task.dtype), device_of(task)
    model = _model(task).eval().to(device, dtype)
    forward = torch.compile(model) if compiled else model
    images = _images(task).to(dtype)

    call = torch.inference_mode()(lambda: forward(images))
    check = torch.inference_mode()(lambda: {"logits": call().float().cpu().numpy()})
    return Program(check, repeated(call, lambda _: wait(device)), facts(device))


def _training(task: ModelTask, *, compiled: bool) -> Program:
    training = Training(task, compiled=compiled)
    images, labels = _images(task), torch.from_numpy(task.labels()).to(training.device)

    def check() -> dict[str, np.ndarray]:
        losses = [training.unmixed_step(images, labels).item() for _ in range(CHECKED_STEPS)]
        return {"losses": np.array(losses), "gradients": training.gradient_norms()}

    def call() -> None:
        training.step(images, labels)  # mixed in place, so the images blur from step to step; the cost is the same

    return Program(check, repeated(call, lambda _: wait(training.device)), facts(training.device))


class Training:
    """timm's model, AdamW and mixing as its train.py has them; images are (batch, channels, height, width) float32."""

    def __init__(self, task: ModelTask, *, compiled: bool = False):
        config, self.device = task.recipe(), device_of(task)
        model = _model(task).train().to(self.device)
        self._parameters = dict(model.named_parameters())
        self._classes, self._config, self._autocast = model.num_classes, config, task.dtype == "bfloat16"
        self._forward = torch.compile(model) if compiled else model
        self._optimizer = adamw(model, config, model.no_weight_decay())
        self._cross_entropy = SoftTargetCrossEntropy()
        alphas = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "switch_prob": config.cutmix_share}
        targets = {"label_smoothing": config.smoothing, "num_classes": model.num_classes}
        self._mix = Mixup(prob=config.mix_prob, **alphas, **targets)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of one step, perhaps not computed yet. Mixes the images in place."""
        if not self._config.mixup:  # of odd batches
            return self.unmixed_step(images, labels)
        return self._step(*self._mix(images, labels))

    def unmixed_step(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._step(images, mixup_target(labels, self._classes, smoothing=self._config.smoothing))

    def gradient_norms(self) -> np.ndarray:
        """The norm of each parameter's first moment in AdamW, by their names in alphabetical order."""
        moments = {name: self._optimizer.state[parameter]["exp_avg"] for name, parameter in self._parameters.items()}
        return np.array([moments[name].norm().item() for name in sorted(moments)])

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._cross_entropy(self._forward(images), targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss


def adamw(model: nn.Module, config: TrainConfig, no_weight_decay: set[str]) -> torch.optim.Optimizer:
    """AdamW with decay as timm has it, at the recipe's first rate."""
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=no_weight_decay)
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _float32_check(task: ModelTask) -> dict[str, np.ndarray] | None:
    """What `check` gives of the same task in float32; None where there is no memory left for that."""
    try:
        return load(dataclasses.replace(task, dtype="float32"), "timm").check()
    except torch.OutOfMemoryError:
        return None


def _peak_flops(task: ModelTask) -> float:
    rows, device = PRODUCT[task.device], device_of(task)
    a, b = torch.randn(2, rows, rows, dtype=getattr(torch, task.dtype), device=device)
    return peak_flops(task.device, lambda: torch.mm(a, b), lambda _: wait(device))


def _model(task: ModelTask) -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model(TIMM_NAMES[task.variant])
    model.to_empty(device="cpu").load_state_dict(load_file(task.weights), strict=True)
    return model


def _images(task: ModelTask) -> Tensor:
    return torch.from_numpy(task.images()).permute(0, 3, 1, 2).to(device_of(task)).contiguous()


def device_of(task: ModelTask) -> torch.device:
    return torch.device("cuda" if task.device == "gpu" else "cpu")


def wait(device: torch.device) -> None:
    """Returns when the results are there; on a CPU a call returns with its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: torch.device) -> dict[str, str]:
    """Versions and threads."""
    told = {"torch": torch.__version__, "timm": timm.__version__, "torch threads": str(torch.get_num_threads())}
    if device.type == "cpu":
        return told | {"torch device": "cpu"}
    libraries = {"CUDA of torch": torch.version.cuda, "cuDNN of torch": str(torch.backends.cudnn.version())}
    return told | libraries | {"torch device": torch.cuda.get_device_name(device)}
