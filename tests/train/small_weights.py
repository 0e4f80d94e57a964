"""A timm CrossViT so small that it compiles in seconds, and weights of it, for tests of what is done with weights."""

from pathlib import Path

import numpy as np
import timm
import torch

import convert
from tests.small_model import small_config


def small_timm_model(classes: int) -> torch.nn.Module:
    """timm's model of these settings, every parameter perturbed so that it tells images apart; in evaluation mode."""
    config = small_config(classes)
    model = timm.create_model(
        "crossvit_tiny_240",
        num_classes=classes,
        img_size=48,
        img_scale=(1.0, 2 / 3),
        embed_dim=list(config.embed_dim),
        depth=[[*config.depth, 0]],
        num_heads=list(config.num_heads),
        mlp_ratio=[*config.mlp_ratio, 1.0],
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + is_norm)
    return model.eval()


def save_small(path: Path, names: str | None, *, order: str | None = None, classes: int | None = None) -> Path:
    """Write weights of `small_timm_model` in the format that the path's ending names.

    Args:
        names: of the classes, one letter each; none: not known, there are so many `classes`.
        order: the same letters in the order in which the outputs are written; none: as they are.
    """
    classes = classes or len(names)
    state = {name: tensor.numpy() for name, tensor in small_timm_model(classes).state_dict().items()}
    if order:
        places = [names.index(name) for name in order]
        state |= {name: np.ascontiguousarray(array[places]) for name, array in state.items() if "head" in name}
    return convert.save(state, small_config(classes), path, class_names=order or names)
