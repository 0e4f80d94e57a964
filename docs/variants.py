"""`python docs/variants.py`: the table of the variants in README.md; `--dense`: in detection-and-segmentation.md."""

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossvit_jax.config import TIMM_NAMES
from crossvit_torch import create_detector, create_model, create_segmenter

# ImageNet top-1 of timm's weights in per cent, as published
TOP1 = {
    **{"ti": 73.352, "s": 81.036, "b": 82.212, "9": 73.994, "15": 81.522, "18": 82.390},
    **{"9-dagger": 76.990, "15-dagger": 82.302, "18-dagger": 82.494, "15-dagger-408": 83.842, "18-dagger-408": 84.198},
}
DENSE = {  # for COCO's classes and for those of ADE20K
    "FCOS": lambda name: create_detector(name, num_classes=80),
    "UPerNet": lambda name: create_segmenter(name, num_classes=150),
    "mask transformer": lambda name: create_segmenter(name, num_classes=150, decoder="mask"),
}


def counted(create: Callable[[str], nn.Module], name: str) -> tuple[nn.Module, int, int]:
    """A variant's model with shapes only, its parameters, and the multiply-adds of one image in matrix products and
    convolutions: what the paper calls FLOPs.

    It is the torch twin, which computes cross-attention in the paper's order; Flax needs a little less.
    """
    # the counter does not know every fused attention kernel, but it knows matrix products
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = create(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, model.config.in_chans, *model.config.image_size))
    return model, sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def classifiers() -> list[list[str]]:
    """Rows, the first with the titles."""
    rows = [["variant", "in timm", "parameters", "GMACs", "top-1"]]
    for name, top1 in TOP1.items():
        _, parameters, macs = counted(create_model, name)
        figures = [f"{parameters / 1e6:.1f} M", f"{macs / 1e9:.2f}", f"{top1:.2f} %"]
        rows.append([f"`{name}`", f"`{TIMM_NAMES[name]}`", *figures])
    return rows


def dense_models() -> list[list[str]]:
    """Rows, the first with the titles; all settings but the classes are the default."""
    rows = [["variant", "image", "width", *(title for kind in DENSE for title in (f"{kind}: parameters", "GMACs"))]]
    for name in TOP1:
        built = [counted(create, name) for create in DENSE.values()]
        config = built[0][0].config
        row = [f"`{name}`", " x ".join(map(str, config.image_size)), str(config.width)]
        for _, parameters, macs in built:
            row += [f"{parameters / 1e6:.2f} M", f"{macs / 1e9:.2f}"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    titles, *rows = dense_models() if sys.argv[1:] == ["--dense"] else classifiers()
    for cells in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(cells)} |")
