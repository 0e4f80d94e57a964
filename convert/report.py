"""What the commands print of weights, and of the files that were made of them."""

from typing import TYPE_CHECKING

from convert.class_names import unlike_timm
from convert.errors import listed
from convert.streams import safe, tell_error
from crossvit_jax.config import CUSTOM, TIMM_NAMES, VARIANTS, CrossViTConfig, DenseConfig, SegmenterConfig

if TYPE_CHECKING:
    from convert.export.export import Exported
    from convert.training.state import TrainingState
    from convert.weights import Weights


def tell_weights(weights: "Weights", stored: str) -> None:
    """Prints what was read, and on stderr what is wrong with it.

    Args:
        stored: the dtypes in the source.
    """
    config = weights.config
    height, width = config.image_size
    branches = " and ".join(f"{h} x {w}" for h, w in config.branch_image_size)
    parameters = sum(array.size for array in weights.tensors.values())
    dtypes = ", ".join(weights.dtypes)
    print(f"variant     {config.name}; in timm: {_in_timm(config)}")
    print(f"image       {height} x {width} pixels (the branches see {branches}), {config.in_chans} channels")
    if config.name == CUSTOM:
        print(f"branches    {' '.join(map(str, config.branches))}")
    if isinstance(config, DenseConfig):
        print(f"task        {_task(config)}")
    print(f"classes     {config.num_classes or 'none: no head'}")
    print(f"weights     {len(weights.tensors)} tensors, {parameters:,} parameters, {dtypes}", end="")
    print("" if dtypes == stored else f" (stored as {stored})")
    for note in weights.notes:
        print(safe(f"note        {note}"))
    warning = weights.non_finite()
    if warning:
        tell_warning(warning)


def tell_training(state: "TrainingState") -> None:
    """Prints where the training stands, and what of it is not carried over."""
    rule = state.rule
    counted = "" if state.updates is None else f", {state.updates:,} updates"
    average = "with" if state.average is not None else "without"
    print(f"training    {state.epochs} epochs{counted}, {rule.optimizer}, learning rate {rule.lr:.4g}, ", end="")
    print(f"{average} an average of the weights")
    for note in state.notes:
        print(safe(f"note        {note}"))


def tell_class_order(weights: "Weights") -> None:
    """Prints a line where timm, given folders of these classes, would take the outputs for others."""
    is_timms = weights.config.task == "classification"
    unlike = None if weights.class_names is None or not is_timms else unlike_timm(weights.class_names)
    if unlike:
        print(
            f"note        {unlike}: timm takes the names in this file's order, one a line, by --class-map; they are "
            "class_names in the metadata of .safetensors"
        )


def tell_warning(warning: str) -> None:
    """Prints one line on stderr."""
    tell_error(f"warning: {warning}")


def tell_result(exported: "Exported") -> int:
    """Prints whether a file was kept, and how far it is from its source; returns the exit status."""
    size = f", {exported.path.stat().st_size:,} bytes" if exported.passed else ""
    print(f"{'written    ' if exported.passed else 'NOT written'} {exported.path}{size}")
    for comparison in exported.comparisons:
        print(safe(f"compared    {comparison}"))
    return 0 if exported.passed else 1


def _task(config: DenseConfig) -> str:
    """What stands on the backbone, and on what of it."""
    by = f" by {config.decoder}{' with scse' if config.scse else ''}" if isinstance(config, SegmenterConfig) else ""
    several = "levels" if len(config.strides) > 1 else "a level"
    return f"{config.task}{by}, on {several} of {listed(map(str, config.strides))} pixels with {config.width} channels"


def _in_timm(config: CrossViTConfig | DenseConfig) -> str:
    """The call that makes this model in timm."""
    if config.name not in TIMM_NAMES or isinstance(config, DenseConfig):
        return "none"
    usual = VARIANTS[config.name]
    height, width = config.image_size
    told = {
        "image_size": f"img_size={height if height == width else config.image_size}",
        "image_scale": f"img_scale=({', '.join(map(str, config.image_scale))})",
        "mlp_ratio": f"mlp_ratio={(*config.mlp_ratio, 1)}",  # the last number is of no block
    }
    fields = ("num_classes", "in_chans", "image_size", "image_scale", "patch_size", "mlp_ratio")
    fields += ("qkv_bias", "global_pool", "crop_scale")
    changed = [field for field in fields if getattr(config, field) != getattr(usual, field)]
    settings = [f", {told.get(field, f'{field}={getattr(config, field)!r}')}" for field in changed]
    return f"timm.create_model('{TIMM_NAMES[config.name]}'{''.join(settings)})"
