"""`TrainConfig`: every setting of a run. The only way settings travel; imports no framework."""

import argparse
import dataclasses
import math
import operator
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from convert.class_names import NATURAL, TEXT
from convert.command_line import data_set, patch_size, reduce_tokens, weights_source
from convert.errors import SettingsError
from convert.files import home_path
from convert.image_files import USUAL_SHARE
from crossvit_jax.config import CUSTOM, EXAMPLE, Branch, CrossViTConfig, get_config, read_fraction
from crossvit_jax.files import MAX_PIXELS

_COMPARE = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
# bounds that several settings have
_SHARE, _PART, _RATE = {"at_least": 0, "at_most": 1}, {"above": 0, "at_most": 1}, {"at_least": 0, "below": 1}
# Settings of some tasks only, and their values where they mean nothing
_CLASSIFICATION = {"mixup": 0, "cutmix": 0, "smoothing": 0, "repeated_aug": 1, "loss": "softmax", "qat": None}
_CLASSIFICATION |= {"auto_augment": "", "erase_prob": 0, "class_order": None, "crop_pct": None, "dropout": 0}
_CLASSIFICATION |= {"crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "mix_prob": 1, "cutmix_share": 0.5}
_CLASSIFICATION |= {"mix_group": None, "patch_sizes": None, "reduce_tokens": None, "class_weights": None}
_CLASSIFICATION |= {"distill": None, "distill_alpha": None, "distill_temperature": 1}
_DENSE = {"width": None, "scale_jitter": (1.0, 1.0)}
_DETECTION = {"num_convs": None, "distances": None}
_SEGMENTATION = {"decoder": None, "dice": 0, "ignore_index": 255}
# of pre-training, by its method
_OF_METHOD = {
    "simmim": {"mask_cell": 24, "mask_ratio": 0.6},
    "dino": {
        "local_crops": 8,
        "local_scale": (0.05, 0.4),
        "prototypes": 65536,
        "teacher_momentum": 0.996,
        "weight_decay_end": None,
    },
}
_PRETRAINING = {"method": None, **_OF_METHOD["simmim"], **_OF_METHOD["dino"]}
_OF_PICTURES = ("crop_pct", "crop_scale", "crop_ratio")  # settings of classification that pre-training has as well
_MEANS_NOTHING = {
    "classification": _DENSE | _DETECTION | _SEGMENTATION | _PRETRAINING,
    "detection": _CLASSIFICATION | _SEGMENTATION | _PRETRAINING,
    "segmentation": _CLASSIFICATION | _DETECTION | _PRETRAINING,
    "pretraining": {name: value for name, value in _CLASSIFICATION.items() if name not in _OF_PICTURES}
    | {**_DENSE, **_DETECTION, **_SEGMENTATION, "freeze_backbone": False},
}
_MOST, _LONGEST_TEXT = 10**15, 4096  # of what is asked for; a path can be no longer
_REPEAT_ROUND = 256  # with repeated augmentation, DeiT's sampler leaves out what does not fill so many places


def setting(
    default: Any,
    help: str,
    parse: Callable[[str], Any] | None = None,
    *,
    section: str = "",
    many: bool = False,
    **bounds: float,
) -> Any:
    """A field of `TrainConfig`; where only some texts will do, its type is the `Literal` of them.

    Args:
        help: its meaning, for the user.
        parse: what turns text into a value; none: the default's type, or text for one that is None.
        section: title of the group of settings that begins with this one.
        many: the value is a tuple, made of one text or more.
        bounds: `at_least`, `above`, `at_most`, `below`: of a number, or of each of a pair, which must not fall. In any
            case it is finite.
    """
    parse = parse or (str if default is None else type(default))
    metadata = {"help": help, "parse": parse, "section": section, "bounds": bounds, "many": many}
    return dataclasses.field(default=default, metadata=metadata)


def number_tuple(text: str) -> tuple[float, ...]:
    """`"1,2/3"` as numbers. Raises ValueError for anything else."""
    return tuple(float(read_fraction(part)) for part in text.split(","))


def number_pair(text: str) -> tuple[float, float]:
    """`"0.08,1"` as two numbers. Raises ValueError for anything else."""
    first, second = number_tuple(text)
    return first, second


def branch_text(text: str) -> str:
    """The settings of a branch, in the words of `str(Branch)`. Raises SettingsError, naming what is wrong."""
    try:
        return str(Branch.parse(text))
    except ValueError as error:
        raise SettingsError(str(error)) from None


def patch_size_text(text: str) -> str:
    """`24,32`, the pixels of the patches of each branch. Raises SettingsError for anything else."""
    try:
        return ",".join(map(str, patch_size(text)))
    except argparse.ArgumentTypeError as error:
        raise SettingsError(str(error)) from None


def reduction_text(text: str) -> str:
    """`merge:8` and the like, see `convert.command_line.reduce_tokens`. Raises SettingsError for anything else."""
    try:
        return reduce_tokens(text)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(str(error)) from None


def class_order(text: str) -> str:
    """`natural`, `text`, or the path of a file as `home_path` returns it."""
    return text if text in (NATURAL, TEXT) else home_path(text)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a run; the defaults are the paper's recipe for ImageNet.

    `None` means "follow something else", which the help text names. Raises SettingsError for values that make no run.
    """

    task: Literal["classification", "detection", "segmentation", "pretraining"] = setting(
        "classification",
        "what is learned: classification, detection (boxes), segmentation (masks) or pretraining (without labels)",
        section="data and run",
    )
    variant: str | None = setting(None, "CrossViT variant, by its short name, timm's or IBM's; none: --init's, or ti")
    branches: tuple[str, ...] | None = setting(
        None,
        f"branches of one's own in place of a variant's, one text for each, such as {EXAMPLE}",
        branch_text,
        many=True,
    )
    init: str | None = setting(
        None, "weights to start from, any SOURCE of python -m convert; none: fresh ones", weights_source
    )
    resume: str | None = setting(
        None,
        "the folder of a run to continue with its settings, the same as its command with --output FOLDER; or a "
        "training checkpoint of timm or IBM (last.pth.tar) to go on from, with the settings given; none: nothing",
        home_path,
    )
    dataset: str = setting(
        "digits",
        "digits, folder:PATH (folder: may be left out), csv:FILE with columns path and label, hf:NAME or hf:PATH of "
        "Hugging Face datasets, or a prepared tensorflow-datasets name; for detection digits "
        "(scenes of them), coco:PATH, voc:PATH or yolo:FILE; for segmentation digits or masks:PATH; for pretraining "
        "as for classification, or a folder of pictures without class folders",
        data_set,
    )
    data_dir: str | None = setting(
        None, "where prepared data sets lie; none: tensorflow-datasets' own folder", home_path
    )
    class_order: str | None = setting(
        None,
        "order of the classes: natural (timm's: class2 before class10, whatever the case), text, or a file with a name "
        "a line; none: the data set's own, which of folders is text",
        class_order,
    )
    val_fraction: float = setting(
        0.1,
        "share of each class held out where folder:, csv: or hf: has no split for that",
        above=0,
        below=1,
    )
    max_bad_images: float = setting(
        USUAL_SHARE,
        "share of the images that may be unreadable before the run stops; unless it is 0, up to 3 of a small data set "
        "may be, or a tenth of it",
        **_SHARE,
    )
    recipe: Literal[
        "imagenet",
        "imagenet-ibm",
        "finetune-408",
        "finetune",
        "transfer",
        "digits",
        "detection",
        "segmentation",
        "pretraining",
        "dino",
        "detection-digits",
        "segmentation-digits",
        "pretraining-digits",
        "dino-digits",
    ] = setting("imagenet", "the set of defaults that the settings start from")
    output: str | None = setting(
        None, "folder of the run: a run in it is continued; none: a new one in runs/", home_path
    )
    seed: int = setting(
        0, "decides initial weights, order of the images, augmentation, dropout and folder splits", at_least=0
    )
    workers: int | None = setting(
        None, "processes that read and augment; 0: threads only; none: one per CPU core", int, at_least=0, at_most=1024
    )

    image_size: int | None = setting(
        None, "side of the square images in pixels; none: the variant's own", int, section="images"
    )
    image_scale: tuple[float, ...] | None = setting(
        None, "share of the image size that each branch sees, such as 1,14/15; none: the branches' own", number_tuple
    )
    patch_sizes: tuple[str, ...] | None = setting(
        None,
        "classification: patch sizes, a number for each branch, of which one is drawn for each step, such as 24,32 "
        "20,28 12,16; the model's own among them; none: that alone",
        patch_size_text,
        many=True,
    )
    reduce_tokens: str | None = setting(
        None,
        "classification: fewer tokens on the way: merge:N (patches that each block merges), fusion:SHARE or "
        "prune:SHARE (that is kept), for the widest branch, or a number for each as in fusion:0.7,0.5; none: all "
        "of them, where --init has fewer; not given: as --init",
        reduction_text,
    )
    crop_pct: float | None = setting(
        None, "share of the resized image kept in evaluation; none: the variant's", float, **_PART
    )
    exif: Literal["keep", "apply"] = setting(
        "keep", "images as they are stored, as timm takes them (keep), or turned as their EXIF orientation says (apply)"
    )
    max_pixels: int = setting(MAX_PIXELS, "images of more pixels are unreadable: they are not decoded", at_least=1)
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "area of a random crop, as share of the image", number_pair, **_PART
    )
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "width / height of a random crop", number_pair, above=0)
    hflip: float = setting(0.5, "probability of a horizontal flip", **_SHARE)
    vflip: float = setting(0.0, "probability of a vertical flip, for pictures that have no upper side", **_SHARE)
    color_jitter: float = setting(
        0.0, "largest change of brightness, contrast and saturation in training, such as 0.4; on the host", at_least=0
    )
    auto_augment: str = setting("rand-m9-mstd0.5-inc1", "timm's RandAugment or AutoAugment string; none: no such step")
    erase_prob: float = setting(0.25, "probability of random erasing (a box of normal noise)", **_SHARE)
    augment_on: Literal["device", "host", None] = setting(
        None, "where images are flipped, augmented and erased: device or host; none: device on GPUs"
    )
    repeated_aug: int = setting(
        1, "differently augmented copies of an image in an epoch of as many fewer images", at_least=1
    )

    mixup: float = setting(0.8, "Mixup's alpha; 0: no Mixup", at_least=0, section="mixing and regularisation")
    cutmix: float = setting(1.0, "CutMix's alpha; 0: no CutMix", at_least=0)
    mix_prob: float = setting(1.0, "probability that a batch is mixed at all", **_SHARE)
    cutmix_share: float = setting(0.5, "share of the mixed batches that CutMix gets, where both are on", **_SHARE)
    mix_group: int | None = setting(
        None,
        "images that are mixed among themselves, all in one way; none: those that a device gets at a time",
        int,
        at_least=1,
    )
    smoothing: float = setting(0.1, "label smoothing", **_RATE)
    drop_path: float = setting(0.1, "stochastic depth of the last block", **_RATE)
    dropout: float = setting(0.0, "dropout before the heads", **_RATE)
    loss: Literal["softmax", "bce"] = setting(
        "softmax", "softmax: soft-target cross-entropy; bce: binary cross-entropy of each class"
    )
    distill: str | None = setting(
        None,
        "classification: a trained classifier to follow beside the labels, any SOURCE of python -m convert; none: none",
        weights_source,
    )
    distill_alpha: float | None = setting(
        None,
        "share of --distill in the loss, that of the labels is the rest; none: both count whole, timm's default",
        float,
        **_SHARE,
    )
    distill_temperature: float = setting(1.0, "what --distill divides the logits of both models by", above=0)

    class_weights: Literal["balanced", None] = setting(
        None,
        "classification: balanced weighs each class in the training loss by images / (classes x images of the class), "
        "for classes of unequal size; none: all alike",
    )

    decoder: Literal["upernet", "mask", None] = setting(
        None,
        "segmentation: upernet (convolutions on a pyramid) or mask (Segmenter's mask transformer); none: upernet",
        section="detection and segmentation",
    )
    width: int | None = setting(
        None, "channels of the pyramid and what stands on it; none: the variant's own", int, at_least=1
    )
    num_convs: int | None = setting(
        None, "detection: convolutions of each tower of the head; none: by the width", int, at_least=1
    )
    distances: tuple[float, ...] | None = setting(
        None,
        "detection: the longest distances from a point to a side of its box, in pixels, at which one level of the "
        "pyramid ends and the next begins, such as 24,48; none: 4 levels, each up to 8 times its stride",
        number_tuple,
        above=0,
    )
    scale_jitter: tuple[float, float] = setting(
        (1.0, 1.0), "smallest and largest size of an image in training; 1: it just fits", number_pair, above=0
    )
    dice: float = setting(
        0.0,
        "segmentation: weight of the Dice loss beside the cross-entropy; with --grad-accum it is that of each part",
        at_least=0,
    )
    ignore_index: int = setting(
        255, "segmentation: the number in masks that stands for no class", at_least=0, at_most=255
    )

    method: Literal["simmim", "dino", None] = setting(
        None,
        "pretraining: simmim (cells of an image are masked, and the model predicts their pixels) or dino (of each crop "
        "of an image the model says what a teacher, its own average, says of another)",
        section="pre-training without labels",
    )
    mask_cell: int = setting(24, "simmim: side of a cell in pixels; it must divide that of the image", at_least=1)
    mask_ratio: float = setting(0.6, "simmim: share of the cells of an image that are masked", **_SHARE)
    local_crops: int = setting(
        8, "dino: crops of half the image's side, beside two of --crop-scale", at_least=0, at_most=64
    )
    local_scale: tuple[float, float] = setting(
        (0.05, 0.4), "dino: area of such a crop, as share of the image", number_pair, **_PART
    )
    prototypes: int = setting(65536, "dino: outputs of the head; small data sets want fewer, such as 1024", at_least=2)
    teacher_momentum: float = setting(
        0.996,
        "dino: what the teacher keeps of itself in the first step, from where it goes to 1 along a cosine",
        **_RATE,
    )

    epochs: int = setting(300, "passes over the training images", at_least=1, section="optimiser and schedule")
    batch_size: int = setting(4096, "images in a step, over all devices", at_least=1)
    grad_accum: int = setting(1, "parts that a step works through one after the other, to save memory", at_least=1)
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "adamw, or sgd with Nesterov momentum")
    momentum: float = setting(0.9, "momentum of sgd", **_RATE)
    lr: float = setting(
        5e-4, "peak learning rate for a batch of --lr-batch-size, scaled linearly to --batch-size", above=0
    )
    lr_batch_size: int = setting(512, "batch size that --lr is meant for", at_least=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "after the warm-up: cosine, linear or constant"
    )
    lr_stepping: Literal["epoch", "step", "epoch-late"] = setting(
        "epoch", "the learning rate changes each epoch, each step, or epoch-late (IBM's code)"
    )
    warmup_epochs: int = setting(
        30, "epochs of linear warm-up; unless given, shrinks with --epochs in the recipe's proportion", at_least=0
    )
    warmup_lr: float = setting(1e-6, "learning rate that the warm-up starts from, not scaled", at_least=0)
    min_lr: float = setting(1e-5, "learning rate that the schedule falls to, not scaled", at_least=0)
    layer_decay: float = setting(1.0, "factor on the learning rate from each block to the one below; 1: none", **_PART)
    weight_decay: float = setting(0.05, "weight decay; none on biases and norms", at_least=0)
    weight_decay_end: float | None = setting(
        None, "dino: weight decay of the last step, to which it goes along a cosine; none: it stays", float, at_least=0
    )
    decay_tokens: bool = setting(False, "weight decay on class tokens and position embeddings too")
    clip_grad: float | None = setting(None, "largest norm of the gradient; none: no clipping", float, above=0)
    freeze_backbone: bool = setting(False, "train the heads only")
    ema_decay: float = setting(
        0.0, "decay of the moving average of the weights, evaluated beside them; 0: none", **_RATE
    )

    precision: Literal["bfloat16", "float16", "float32", None] = setting(
        None,
        "of the arithmetic, parameters are float32; float16 with loss scaling; none: bfloat16 on accelerators, float16 "
        "on GPUs that have no bfloat16 (before compute capability 8.0), float32 on CPUs",
        section="arithmetic and devices",
    )
    fp32_residual: bool = setting(
        False,
        "in half precision, keep what flows from block to block in float32, as torch.autocast does: nearer to exact, "
        "and more memory traffic",
    )
    attention_kernel: Literal["auto", "xla", "cudnn", "tpu"] = setting(
        "auto",
        "what computes self-attention: xla, cudnn (NVIDIA GPUs from compute capability 8.0 on, in half precision), or "
        "tpu (a kernel for TPUs; xla on other devices); auto: cudnn where it can, tpu on TPUs",
    )
    deterministic: bool = setting(
        False, "on GPUs the same steps give the same bits, more slowly; CPUs and TPUs compute so anyway"
    )
    qat: Literal["int8", "int4", None] = setting(
        None, "int8 or int4: the weights learn to be rounded to it, see docs/quantisation-aware-training.md"
    )
    grad_checkpointing: bool = setting(False, "compute each block again in the backward pass, to save memory")
    mesh: str | None = setting(None, "devices by axis, such as data=4,fsdp=2; none: all on data")
    coordinator: str | None = setting(
        None, "address:port of process 0, where jax does not find the other hosts by itself"
    )
    num_processes: int | None = setting(None, "number of processes, with --coordinator", int, at_least=1)
    process_id: int | None = setting(None, "which of them this is, from 0, with --coordinator", int, at_least=0)
    join_timeout: int = setting(120, "seconds that processes wait for the others of a run when they start", at_least=1)

    log_every: int = setting(
        50, "steps between two lines of training metrics", at_least=1, section="logs and checkpoints"
    )
    eval_every: int = setting(1, "epochs between two evaluations; the last epoch is always evaluated", at_least=1)
    patience: int | None = setting(
        None,
        "epochs without a better evaluation after which the run ends; none: it goes on to the last",
        int,
        at_least=1,
    )
    checkpoint_every: int = setting(
        1000, "steps between two checkpoints; one more is written after every epoch", at_least=1
    )
    wandb: str | None = setting(None, "project of Weights & Biases to log to; none: only into the run's folder")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.seed >= 2**32:
            raise SettingsError(f"seed must be below 2**32; got {self.seed}")
        if self.warmup_epochs >= self.epochs:
            raise SettingsError(f"warmup_epochs must be below the {self.epochs} epochs; got {self.warmup_epochs}")
        if self.branches is not None:
            if self.variant not in (None, CUSTOM):
                raise SettingsError(f"branches replace those of the variant {self.variant}: leave one out")
            if self.image_scale is not None:
                raise SettingsError("image_scale is a setting of each of the branches: leave it out")
        if self.batch_size % self.grad_accum:
            raise SettingsError(f"batch_size {self.batch_size} cannot be cut into grad_accum {self.grad_accum} parts")
        if self.batch_size % min(self.mix_group or 1, self.batch_size):
            raise SettingsError(
                f"batch_size {self.batch_size} cannot be cut into groups of mix_group {self.mix_group} images"
            )
        if self.init is not None and self.resume is not None:
            raise SettingsError("init begins anew from weights, and resume goes on with a run: leave one out")
        if self.class_weights is not None and self.loss != "softmax":
            raise SettingsError(
                f"class_weights {self.class_weights} is for loss softmax: in {self.loss}, each class has a loss of its "
                "own, whose sides a weight does not balance"
            )
        if self.qat is not None and self.init is None and self.resume is None:
            raise SettingsError(f"qat {self.qat} is for weights that are trained already: name them with --init")
        if self.qat is not None and self.freeze_backbone:
            raise SettingsError(
                f"qat {self.qat} rounds all but the heads, and freeze_backbone trains only them: leave one out"
            )
        if self.patch_sizes is not None:
            if self.qat is not None:
                raise SettingsError(f"qat {self.qat} rounds kernels, and patch_sizes resizes them: leave one out")
            twice = {size for size in self.patch_sizes if self.patch_sizes.count(size) > 1}
            if twice:
                raise SettingsError(f"patch_sizes names {', '.join(sorted(twice))} twice")
        if self.distill is None and (self.distill_alpha is not None or self.distill_temperature != 1):
            name = "distill_temperature" if self.distill_alpha is None else "distill_alpha"
            raise SettingsError(f"{name} is a setting of --distill: name the classifier to follow")
        for name, nothing in _MEANS_NOTHING[self.task].items():
            if getattr(self, name) != nothing:
                raise SettingsError(f"{name} is no setting of {self.task}; got {getattr(self, name)}")
        if self.task == "pretraining":
            self._check_pretraining()
        if self.task in ("detection", "segmentation") and self.augment_on == "device":
            raise SettingsError(f"augment_on device is no setting of {self.task}: images come with boxes or masks")
        distributed = (self.coordinator, self.num_processes, self.process_id)
        if any(value is None for value in distributed) != all(value is None for value in distributed):
            raise SettingsError("coordinator, num_processes and process_id go together: give all three or none")
        if re.search(r"\d{4}", self.auto_augment):  # such as a thousand operations on each image
            raise SettingsError(f"auto_augment has numbers below 1000; got {self.auto_augment[:100]}")
        if self.variant not in (None, CUSTOM):
            try:
                get_config(self.variant)
            except ValueError as error:
                raise SettingsError(str(error)) from None
        port = None if self.coordinator is None else re.fullmatch(r"[^\s/]+:([0-9]{1,5})", self.coordinator)
        if self.coordinator is not None and not (port and 0 < int(port[1]) < 2**16):
            raise SettingsError(f"coordinator must be address:port, such as 10.0.0.1:1234; got {self.coordinator}")
        if self.coordinator is not None and self.process_id >= self.num_processes:
            raise SettingsError(f"process_id must be below num_processes {self.num_processes}; got {self.process_id}")

    def _check_pretraining(self) -> None:
        """Raises SettingsError for settings of another method than the one that is asked for."""
        if self.method is None:
            raise SettingsError("pretraining needs a method; got none")
        others = [settings for method, settings in _OF_METHOD.items() if method != self.method]
        for name, nothing in (item for settings in others for item in settings.items()):
            if getattr(self, name) != nothing:
                raise SettingsError(f"{name} is no setting of {self.method}; got {getattr(self, name)}")
        if self.method == "dino" and self.augment_on == "device":
            raise SettingsError("augment_on device is no setting of dino: an image is cut into several crops")
        if self.method == "dino" and self.ema_decay:
            raise SettingsError("ema_decay is no setting of dino: its teacher is an average, and is what a run leaves")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up, for this batch size (IBM main.py:245)."""
        return self.lr * self.batch_size / self.lr_batch_size

    @property
    def drawn_patch_sizes(self) -> tuple[tuple[int, ...], ...] | None:
        """`patch_sizes` as numbers."""
        return self.patch_sizes and tuple(tuple(map(int, size.split(","))) for size in self.patch_sizes)

    @property
    def distill_weights(self) -> tuple[float, float]:
        """What the loss of the labels and that of the teacher are multiplied by (timm/task/distillation.py)."""
        return (1.0, 1.0) if self.distill_alpha is None else (1 - self.distill_alpha, self.distill_alpha)

    def model_overrides(self) -> dict[str, Any]:
        """The settings of `CrossViTConfig` that these decide."""
        overrides = {
            "branches": self.branches and tuple(map(Branch.parse, self.branches)),
            "image_size": self.image_size,
            "image_scale": self.image_scale,
            "crop_pct": self.crop_pct,
            "reduce_tokens": self.reduce_tokens,
            "drop_rate": self.dropout,
            "drop_path_rate": self.drop_path,
        }
        return {key: value for key, value in overrides.items() if value is not None}

    def dense_overrides(self) -> dict[str, Any]:
        """The settings of a detector or segmenter that these decide, beside those of its backbone."""
        overrides = {
            "width": self.width,
            "num_convs": self.num_convs,
            "distances": self.distances,
            "decoder": self.decoder,
        }
        return {key: value for key, value in overrides.items() if value is not None}

    def model_config(self, num_classes: int) -> CrossViTConfig:
        """The settings of a fresh model to train. Raises SettingsError if variant or sizes make none."""
        overrides = {"num_classes": num_classes, **self.model_overrides()}
        try:
            if self.branches is not None:
                return CrossViTConfig(name=CUSTOM, **overrides)
            return get_config(self.variant or "ti", **overrides)
        except ValueError as error:
            raise SettingsError(str(error)) from error


def steps_per_epoch(images: int, batch_size: int, repeats: int = 1) -> int:
    """Whole batches in an epoch; the rest is left out, another rest in each epoch.

    With repeated augmentation an epoch has as many places as without, but rounded down to a multiple of 256, as in
    DeiT's sampler. That one has no places at all for fewer than 256 images; here they all count, as in timm's.
    """
    places = images // _REPEAT_ROUND * _REPEAT_ROUND if repeats > 1 and images >= _REPEAT_ROUND else images
    return places // batch_size


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises SettingsError if a value is not of the type of its field, among its choices, or within its bounds."""
    choices, bounds = [text for text in get_args(field.type) if isinstance(text, str)], field.metadata["bounds"]
    if value is None and _is_of(None, field.type):
        return
    if choices:
        fine, accepted = isinstance(value, str) and value in choices, " or ".join(choices)
    elif not _is_of(value, field.type):
        fine, accepted = False, _type_in_words(field.type)
    else:
        numbers = value if isinstance(value, tuple) else (value,)
        # NaN is refused too: every comparison with it is false
        fine = all(_COMPARE[name](number, bound) for name, bound in bounds.items() for number in numbers)
        fine = fine and (not bounds or (list(numbers) == sorted(numbers) and max(numbers) < math.inf))
        accepted = _in_words(bounds, pair=len(numbers) > 1)
    if not fine:
        raise SettingsError(f"{field.name} must be {accepted}; got {str(value)[:100]}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value, perhaps from a file, is of the type of a field."""
    if get_origin(kind) in (types.UnionType, Union):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        alike = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[1:] == (...,) else kinds
        return isinstance(value, tuple) and len(value) == len(alike) and all(map(_is_of, value, alike))
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < _MOST)
    if kind is int:
        return isinstance(value, int) and abs(value) < _MOST
    if kind is str:
        return isinstance(value, str) and "\0" not in value and len(value) <= _LONGEST_TEXT
    return value is None and kind is types.NoneType


def _type_in_words(kind: Any) -> str:
    if get_origin(kind) in (types.UnionType, Union):
        return " or ".join(_type_in_words(one) for one in get_args(kind) if one is not types.NoneType)
    if get_origin(kind) is tuple:
        return f"a list of such: {_type_in_words(get_args(kind)[0])}"
    words = {int: f"a whole number below {_MOST:.0e}", float: "a number", bool: "true or false"}
    return words.get(kind, f"a text without NUL, of at most {_LONGEST_TEXT} characters")


def _in_words(bounds: dict[str, float], *, pair: bool) -> str:
    words = [f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items()]
    if pair:
        return f"rising numbers {', '.join(words)}"
    if bounds == {"at_least": 0}:
        return "0 or more"
    if bounds == _SHARE:
        return "between 0 and 1"
    return " and ".join(words)
