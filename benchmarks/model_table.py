"""The command `python -m benchmarks.model_table`: the variants, measured, beside the paper's figures, as Markdown.

With `--dense`, the detectors and segmenters that are made of them.
"""

import math
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import crossvit_torch
from benchmarks.command import parser_of
from benchmarks.result import markdown_table
from convert.architecture import expected_shapes
from convert.command_line import leave, run
from crossvit_jax.config import TIMM_NAMES, VARIANTS, CrossViTConfig, DenseConfig, get_dense_config

# parameters in millions, "FLOPs" (multiply-adds) in 10⁹, ImageNet top-1 in percent: arXiv 2103.14899, tables 2 and 4;
# and top-1 of timm's published weights
_PUBLISHED = {
    "ti": (6.9, 1.6, 73.4, 73.352),
    "s": (26.7, 5.6, 81.0, 81.036),
    "b": (104.7, 21.2, 82.2, 82.212),
    "9": (8.6, 1.8, 73.9, 73.994),
    "15": (27.4, 5.8, 81.5, 81.522),
    "18": (43.3, 9.0, 82.5, 82.390),
    "9-dagger": (8.8, 2.0, 77.1, 76.990),
    "15-dagger": (28.2, 6.1, 82.3, 82.302),
    "18-dagger": (44.3, 9.5, 82.8, 82.494),
    "15-dagger-408": (28.5, 21.4, 83.5, 83.842),
    "18-dagger-408": (44.6, 32.4, 83.9, 84.198),
}
_TWINS = {
    "classification": crossvit_torch.CrossViT,
    "detection": crossvit_torch.CrossViTDetector,
    "segmentation": crossvit_torch.CrossViTSegmenter,
}
# for COCO's classes and for those of ADE20K
_DENSE = {
    "FCOS": ("detection", {"num_classes": 80}),
    "UPerNet": ("segmentation", {"num_classes": 150}),
    "mask transformer": ("segmentation", {"num_classes": 150, "decoder": "mask"}),
}
_HEADER = (
    *("variant", "in timm", "image", "parameters", "in the paper", "GMACs", "in the paper"),
    *("top-1 in the paper", "of timm's weights"),
)


def parameters(config: CrossViTConfig | DenseConfig) -> int:
    """The number of parameters of our Flax model."""
    return sum(map(math.prod, expected_shapes(config).values()))


def multiply_adds(config: CrossViTConfig | DenseConfig) -> int:
    """Multiply-adds of one image's forward pass in matrix products and convolutions: what the paper calls FLOPs.

    Counted in the torch twin, which computes cross-attention in the paper's order (Flax needs a little less). Nothing
    is computed: the tensors have shapes only.
    """
    # the counter does not know every fused attention kernel, but it knows matrix products
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = _TWINS[config.task](config).eval()
        images = torch.empty(1, config.in_chans, *config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(images)
    return counter.get_total_flops() // 2


def table() -> str:
    """The Markdown table."""
    rows = []
    for name, config in VARIANTS.items():
        paper_parameters, paper_macs, paper_top1, timm_top1 = _PUBLISHED[name]
        row = [f"`{name}`", f"`{TIMM_NAMES[name]}`", " x ".join(map(str, config.image_size))]
        row += [f"{parameters(config):,}", f"{paper_parameters} M", f"{multiply_adds(config) / 1e9:.2f}"]
        rows.append([*row, str(paper_macs), f"{paper_top1:.1f} %", f"{timm_top1:.2f} %"])
    return "\n".join(markdown_table(_HEADER, rows))


def dense_table() -> str:
    """The Markdown table of detectors and segmenters with their default settings."""
    rows = []
    for name, config in VARIANTS.items():
        built = [get_dense_config(task, name, **settings) for task, settings in _DENSE.values()]
        row = [f"`{name}`", " x ".join(map(str, config.image_size)), str(built[0].width)]
        for dense in built:
            row += [f"{parameters(dense) / 1e6:.2f} M", f"{multiply_adds(dense) / 1e9:.2f}"]
        rows.append(row)
    figures = [title for kind in _DENSE for title in (f"{kind}: parameters", "GMACs")]
    return "\n".join(markdown_table(["variant", "image", "width", *figures], rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = parser_of("model_table", "Print the table of variants.", epilog="")
    parser.add_argument("--dense", action="store_true", help="that of the detectors and segmenters made of them")
    args = parser.parse_args(argv)
    return run(parser.prog, lambda: print(dense_table() if args.dense else table()) or 0)


if __name__ == "__main__":
    leave(main())
