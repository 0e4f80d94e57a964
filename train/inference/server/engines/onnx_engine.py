"""An exported ONNX file as the server's engine, run by ONNX Runtime on CPUs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import metadata
from convert.errors import ConversionError, SettingsError, one_line, require
from crossvit_jax.preprocess import Exif, normalised
from train.images.dense import WholeTransform
from train.images.transforms import eval_transform
from train.inference.server.engines.engine import Explained, Images, batch_sizes, rows_of

_OUTPUTS = {
    "classification": ["logits"],
    "detection": ["boxes", "scores", "labels", "valid"],
    "segmentation": ["logits"],
}


class OnnxEngine:
    """What `python -m convert SOURCE FILE.onnx` wrote, of any dtype.

    A dynamically quantised file finds the ranges of its activations in the whole batch, so that neighbours would change
    an answer: it gets one image at a time.

    Args:
        largest: images in the largest batch.
        crop_pct, exif: as in `train.inference.model.load_predictor`; none: what the file tells.

    Raises:
        SettingsError: onnxruntime is missing; or the file cannot be read, does not tell what it is, or does not take
            colour images and return what the others are served with; or `crop_pct` is given for no classifier.
    """

    platform = "onnxruntime_onnx"
    explains = False

    def __init__(self, path: Path, largest: int, *, crop_pct: float | None = None, exif: Exif | None = None):
        self._session = _session(path)
        about = self._session.get_modelmeta().custom_metadata_map
        if metadata.KEY not in about:
            raise SettingsError(f"{path} does not tell what it is: write it with python -m convert SOURCE {path.name}")
        try:
            config, names = metadata.understand(about[metadata.KEY])
        except ConversionError as error:
            raise SettingsError(f"{path}: {error}") from None
        takes, gives = ([one.name for one in some()] for some in (self._session.get_inputs, self._session.get_outputs))
        if takes == ["pictures"]:
            raise SettingsError(
                f"{path} has preprocessing in it, which is the server's: export it without --preprocess"
            )
        wanted = _OUTPUTS[config.task]
        if (takes, gives) != (["images"], wanted) or config.in_chans != 3:
            told = f"{path} takes {', '.join(takes)} with {config.in_chans} channels and gives {', '.join(gives)}"
            raise SettingsError(f"{told}; served are files that take colour images and give {', '.join(wanted)}")
        self.class_names = names or tuple(map(str, range(config.num_classes)))
        exif = exif or metadata.recorded_exif(about[metadata.KEY]) or "keep"
        self.most_objects = self._session.get_outputs()[0].shape[1] if config.task == "detection" else 0
        if config.task == "classification":
            self.config = config if crop_pct is None else config.replace(crop_pct=crop_pct)
            self.transform = eval_transform(self.config, exif)
        elif crop_pct is not None:
            raise SettingsError(f"{path} is for {config.task}, which has no setting crop-pct")
        else:
            self.config, self.transform = config, WholeTransform(config.image_size, exif)
        self.is_dynamic = about.get("quantization") == "dynamic"
        self.sizes = (1,) if self.is_dynamic else batch_sizes(largest)
        size = " x ".join(map(str, dict.fromkeys(config.image_size)))
        kind = {"detection": " detector", "segmentation": " segmenter"}.get(config.task, "")
        self.headline = f"CrossViT {config.name}{kind} at {size} pixels, {config.num_classes} classes, "
        self.headline += f"in {about['dtype']} by ONNX Runtime"

    def compile(self) -> None:
        for size in self.sizes:  # which plans the memory for each
            self.compute(np.zeros((size, *self.config.image_size, 3), np.uint8))

    def compute(self, images: Images) -> Sequence[Any]:
        taken = np.ascontiguousarray(normalised(images).transpose(0, 3, 1, 2))
        outputs = self._session.run(None, {"images": taken})
        if self.config.task == "detection":
            return rows_of(dict(zip(_OUTPUTS["detection"], outputs, strict=True)), len(images))
        (logits,) = outputs
        if self.config.task == "segmentation":
            return rows_of({"logits": logits.transpose(0, 2, 3, 1)}, len(images))
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def explain(self, images: Images) -> Explained:
        raise NotImplementedError("an ONNX file has no attention maps; `explains` says so")


def _session(path: Path) -> Any:
    require(str(path), "onnxruntime")
    import onnxruntime

    if not path.is_file():
        raise SettingsError(f"{path} does not exist")
    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # as many types as there are ways to fail, none of them documented
        raise SettingsError(f"{path} cannot be read: {one_line(error)}") from None
