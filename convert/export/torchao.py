"""The PyTorch twin with the linear layers that `python -m train.main --qat` rounds, rounded by torchao; and its file.

Both schemes are torchao's own. int8 is that of `--qat int8` (see `train.optim.quantize`): a scale for each output of
the weights, and for each token of what they multiply, the largest absolute value ÷ 127.5. int4 rounds weights as
`--qat int4` does, ÷ 7.5; but torchao fits the 8 bits of a token to its smallest and largest value, where qwix keeps
zero in the middle.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from convert import metadata
from convert.errors import ConversionError, one_line, quiet, require
from convert.files import typed_path
from convert.formats.torch_files import load_plain
from convert.models import torch_model
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig

if TYPE_CHECKING:
    import torch

    import crossvit_torch

Scheme = Literal["int8", "int4"]

FORMAT = 1
_WEIGHTS = "quantized"  # no name under which readers of checkpoints look for weights


@dataclass(frozen=True, kw_only=True)
class TorchaoFile:
    """What such a file holds."""

    config: CrossViTConfig
    class_names: tuple[str, ...] | None  # in the order of the logits
    scheme: Scheme
    tensors: "Mapping[str, torch.Tensor]"  # the state dict of the quantised twin


def quantised_twin(weights: Weights, scheme: Scheme) -> "crossvit_torch.CrossViT":
    """The twin with these weights, its linear layers quantised, in evaluation mode.

    Args:
        weights: in float32.
    """
    import torch

    with quiet("torch.utils._pytree"):  # torch tells the user that torchao registers enums
        from torchao import quantization
        from torchao.quantization.granularity import PerAxis
    if scheme == "int8":  # settings of the compiler belong to the program that compiles
        how = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    else:
        kind = {"weight_dtype": torch.int4, "weight_granularity": PerAxis(0)}
        how = quantization.Int8DynamicActivationIntxWeightConfig(**kind)
    model = torch_model(weights)
    quantization.quantize_(model, how, is_quantised)
    return model.requires_grad_(False)


def torchao_file(weights: Weights, scheme: Scheme) -> memoryview:
    """A file of the quantised twin, for `load_torchao`: plain values and tensors, as `torch.load(weights_only=True)`
    wants it.

    Args:
        weights: in float32.
    """
    import torch

    content = metadata.summary(weights) | {
        "format": FORMAT,
        "quantize": scheme,
        "num_classes": weights.config.num_classes,
        "torchao": metadata.version("torchao"),
        _WEIGHTS: quantised_twin(weights, scheme).state_dict(),
    }
    buffer = io.BytesIO()  # torch's own file writer reports a full disk as an internal assertion
    torch.save(content, buffer)
    return buffer.getbuffer()


def is_quantised(module: "torch.nn.Module", path: str) -> bool:
    """Whether `--qat` rounds what a module of the twin at this path multiplies.

    Those are the linear layers of the transformer, without the key and value projections of cross-attention: these fold
    into the scores and sums in Flax. The heads stay as they are.
    """
    import torch

    name = path.split(".")
    return isinstance(module, torch.nn.Linear) and name[0] == "blocks" and name[-1] not in ("wk", "wv")


def load_torchao(path: str | Path) -> "crossvit_torch.CrossViT":
    """The quantised twin in a `.pt` file, in evaluation mode: its logits are those of the model that was written.

    Its `config` tells image size and classes; `read_torchao` also tells the names of these.

    Raises:
        ConversionError: see `read_torchao`.
    """
    import crossvit_torch

    stored = read_torchao(path)
    model = crossvit_torch.CrossViT(stored.config, device="meta")
    try:
        # assigned, not copied: what is there has neither memory nor integers
        model.load_state_dict(stored.tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{path} holds other tensors than its model has: {one_line(error)}") from None
    return model.eval().requires_grad_(False)


def read_torchao(path: str | Path) -> TorchaoFile:
    """What is in a file of `python -m convert`, of which nothing is run.

    Raises:
        MissingExtra: torchao is not installed.
        ConversionError: there is no such file, it is damaged or of a newer format, or it is another file.
    """
    path = typed_path(path)
    require(str(path), "torchao", "torch", extra="torchao")
    with quiet("torch.utils._pytree"):
        import torchao.quantization  # noqa: F401 (tells torch that its classes are safe to load)
    if not path.is_file():
        raise ConversionError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    stored = load_plain(path)
    if not isinstance(stored, Mapping) or _WEIGHTS not in stored or metadata.KEY not in stored:
        raise ConversionError(f"{path} is no model that python -m convert wrote")
    if stored["format"] > FORMAT:
        raise ConversionError(f"{path} was written by a newer version (format {stored['format']})")
    try:
        config, class_names = metadata.understand(stored[metadata.KEY])
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    return TorchaoFile(config=config, class_names=class_names, scheme=stored["quantize"], tensors=stored[_WEIGHTS])
