"""`TrainConfig`: every setting of a run, and the recipes. The only way settings travel; imports no framework."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from crossvit_jax.config import CrossViTConfig, get_config


class SettingsError(ValueError):
    """A mistake in what was asked for. Its message is one line, shown as it is; the program then exits with 2."""


def setting(default: Any, help: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A field of `TrainConfig`: default, meaning, and what turns text into a value (none: the default's type)."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse or type(default)})


def number_pair(text: str) -> tuple[float, float]:
    """`"0.08,1"` or `"1,2/3"` as two numbers. Raises ValueError for anything else."""
    try:
        first, second = (float(Fraction(part.strip())) for part in text.split(","))
    except ZeroDivisionError as error:
        raise ValueError(text) from error
    return first, second


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a run; the defaults are the paper's recipe for ImageNet.

    `None` means "follow something else", which the help text names. Raises SettingsError for values that make no run.
    """

    # what is trained, on what, where it is kept
    variant: str = setting("ti", "CrossViT variant, by its short name, timm's or IBM's")
    dataset: str = setting("digits", "digits, a prepared tensorflow-datasets name, or folder:PATH")
    data_dir: str | None = setting(None, "where prepared data sets lie; none: tensorflow-datasets' own folder", str)
    val_fraction: float = setting(0.1, "share of each class held out when folder:PATH has no val/ or test/ folder")
    recipe: str = setting("imagenet", "the set of defaults that the settings start from")
    output: str | None = setting(None, "folder of the run, new or empty; none: a new one under runs/", str)
    seed: int = setting(0, "decides initial weights, order of the images, augmentation, dropout and folder splits")
    workers: int | None = setting(None, "processes that read and augment; 0: threads only; none: one per CPU core", int)
    # images
    image_size: int | None = setting(None, "side of the square images in pixels; none: the variant's own", int)
    image_scale: tuple[float, float] | None = setting(
        None, "share of the image size that each branch sees, such as 1,14/15; none: the variant's own", number_pair
    )
    crop_pct: float | None = setting(None, "share of the resized image kept in evaluation; none: the variant's", float)
    crop_scale: tuple[float, float] = setting((0.08, 1.0), "area of a random crop, as share of the image", number_pair)
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "width / height of a random crop", number_pair)
    hflip: float = setting(0.5, "probability of a horizontal flip")
    auto_augment: str = setting("rand-m9-mstd0.5-inc1", "timm's RandAugment or AutoAugment string; none: no such step")
    erase_prob: float = setting(0.25, "probability of random erasing (a box of normal noise)")
    # mixing and regularisation
    mixup: float = setting(0.8, "Mixup's alpha; 0: no Mixup")
    cutmix: float = setting(1.0, "CutMix's alpha; 0: no CutMix")
    mix_prob: float = setting(1.0, "probability that a batch is mixed at all")
    cutmix_share: float = setting(0.5, "share of the mixed batches that CutMix gets, where both are on")
    smoothing: float = setting(0.1, "label smoothing")
    drop_path: float = setting(0.1, "stochastic depth of the last block")
    # optimiser and schedule
    epochs: int = setting(300, "passes over the training images")
    batch_size: int = setting(4096, "images in a step, over all devices")
    lr: float = setting(5e-4, "peak learning rate for a batch of --lr-batch-size, scaled linearly to --batch-size")
    lr_batch_size: int = setting(512, "batch size that --lr is meant for")
    warmup_epochs: int = setting(
        30, "epochs of linear warm-up; unless given, shrinks with --epochs in the recipe's proportion"
    )
    warmup_lr: float = setting(1e-6, "learning rate that the warm-up starts from, not scaled")
    min_lr: float = setting(1e-5, "learning rate that the cosine falls to, not scaled")
    lr_stepping: str = setting("timm", "timm: epoch e runs at step e of the schedule; ibm: one epoch late")
    weight_decay: float = setting(
        0.05, "AdamW's weight decay; none on biases, norms, class tokens, position embeddings"
    )
    # what is told on the way
    log_every: int = setting(50, "steps between two lines of training metrics")
    eval_every: int = setting(1, "epochs between two evaluations; the last epoch is always evaluated")

    def __post_init__(self):
        at_least_one = ("epochs", "batch_size", "lr_batch_size", "log_every", "eval_every")
        at_least_zero = ("seed", "workers", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "mixup", "cutmix")
        shares = ("hflip", "erase_prob", "mix_prob", "cutmix_share")
        shares_below_one = ("smoothing", "drop_path")
        for name in at_least_one:
            _require(self, name, lambda value: value >= 1, "at least 1")
        for name in at_least_zero:
            _require(self, name, lambda value: 0 <= value < float("inf"), "0 or more")
        for name in shares:
            _require(self, name, lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in shares_below_one:
            _require(self, name, lambda value: 0 <= value < 1, "at least 0 and below 1")
        _require(self, "seed", lambda value: value < 2**32, "below 2**32")
        _require(self, "lr", lambda value: 0 < value < float("inf"), "above 0")
        _require(self, "val_fraction", lambda value: 0 < value < 1, "above 0 and below 1")
        _require(self, "crop_pct", lambda value: 0 < value <= 1, "above 0 and at most 1")
        _require(self, "crop_scale", lambda pair: 0 < pair[0] <= pair[1] <= 1, "two rising numbers above 0, at most 1")
        _require(self, "crop_ratio", lambda pair: 0 < pair[0] <= pair[1], "two rising numbers above 0")
        _require(self, "lr_stepping", lambda value: value in ("timm", "ibm"), "timm or ibm")
        _require(self, "recipe", lambda value: value in _RECIPE_NAMES, " or ".join(_RECIPE_NAMES))
        _require(self, "warmup_epochs", lambda value: value < self.epochs, f"below the {self.epochs} epochs")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up, for this batch size (IBM main.py:245)."""
        return self.lr * self.batch_size / self.lr_batch_size

    def model_config(self, num_classes: int) -> CrossViTConfig:
        """The settings of the model to train. Raises SettingsError for an unknown variant or sizes that do not fit."""
        overrides = {
            "image_size": self.image_size,
            "image_scale": self.image_scale,
            "crop_pct": self.crop_pct,
            "drop_path_rate": self.drop_path,
            "num_classes": num_classes,
        }
        try:
            return get_config(self.variant, **{key: value for key, value in overrides.items() if value is not None})
        except ValueError as error:
            raise SettingsError(str(error)) from error


def _require(config: TrainConfig, name: str, accepted: Callable[[Any], bool], description: str) -> None:
    value = getattr(config, name)
    if value is not None and not accepted(value):  # NaN is refused too: every comparison with it is false
        raise SettingsError(f"{name} must be {description}; got {value}")


_RECIPE_NAMES = ("imagenet", "digits")

RECIPES: dict[str, TrainConfig] = {
    # arXiv 2103.14899 §4.1 and IBM's main.py: batch 4,096 at learning rate 0.004
    "imagenet": TrainConfig(recipe="imagenet"),
    # 8×8 grey digits blown up to 48 pixels, chosen by short trials on two CPU cores. A mirrored digit is no digit, and
    # so few epochs are too few to profit from mixing, so only the crop is random.
    "digits": TrainConfig(
        recipe="digits",
        image_size=48,
        image_scale=(1.0, 2 / 3),
        crop_pct=1.0,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.8, 1.25),
        hflip=0.0,
        auto_augment="",
        erase_prob=0.0,
        mixup=0.0,
        cutmix=0.0,
        smoothing=0.1,
        drop_path=0.0,
        epochs=14,
        batch_size=64,
        lr=1e-3,
        lr_batch_size=64,
        warmup_epochs=1,
        warmup_lr=3e-4,
        workers=0,
    ),
}
