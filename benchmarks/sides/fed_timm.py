"""timm's loader and step, as its train.py puts them together, each at its best.

Workers live on and read ahead over the end of an epoch; on a GPU with pinned memory and timm's prefetcher. Images are
mixed on the device, after erasing, as the paper has it; train.py has the workers do it, which costs them time.
"""

from collections.abc import Iterator

import numpy as np
import torch
from timm.data import ImageDataset, create_loader
from torch import Tensor

from benchmarks.sides.fed import fed_program, wait_for_rest
from benchmarks.sides.timm import Training, facts, set_up, wait
from benchmarks.task import EndToEndTask, Program
from train.images.transforms import timm_settings

# At most: torch asks each worker for two, one waits in pinned memory and one on the device.
_AHEAD_PER_WORKER, _AHEAD = 2, 2


def load(task: EndToEndTask, side: str) -> Program:
    """The program; its workers start with the first batch."""
    set_up()
    training = Training(task)
    config, on_gpu = task.fed_recipe("host"), training.device.type == "cuda"
    loader = create_loader(
        ImageDataset(f"{task.folder}/train"),
        input_size=(3, *task.config().image_size),
        batch_size=config.batch_size,
        **timm_settings(config),
        num_workers=task.workers,
        persistent_workers=True,
        use_multi_epochs_loader=True,
        pin_memory=on_gpu,
        use_prefetcher=on_gpu,
        device=training.device,
    )
    batches = _endless(loader)
    del loader  # so that `batches.close` ends the workers

    def look() -> tuple[np.ndarray, np.ndarray]:
        images, labels = next(batches)
        return images.permute(0, 2, 3, 1).cpu().numpy(), labels.cpu().numpy()

    def train(steps: int) -> None:
        for _ in range(steps):
            training.step(*next(batches))
        wait(training.device)

    def rest() -> None:
        wait_for_rest()
        torch.cuda.empty_cache()  # does nothing on a CPU

    ahead = _AHEAD_PER_WORKER * task.workers + _AHEAD
    how = {"look": look, "train": train, "ahead": ahead, "facts": facts(training.device), "close": batches.close}
    return fed_program(task, take=lambda: next(batches), rest=rest, **how)


def _endless(loader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader
