"""Command-line flags: one for every field of `TrainConfig`, with the chosen recipe's values as defaults."""

import argparse
import dataclasses
import functools
import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from convert.command_line import Parser, Program
from convert.errors import SettingsError
from convert.files import home_path
from train.config import TrainConfig
from train.recipes import RECIPES
from train.run.folder import read_settings, read_settings_file

# the flags that --help tells first; the others stand in the groups of their settings
_EVERYDAY = ("task", "variant", "init", "resume", "dataset", "data_dir", "recipe", "output", "seed", "image_size")
_EVERYDAY += ("epochs", "batch_size", "lr", "precision")
_DIGITS = "digits"  # the data set that has recipes of its own
_TASKS = get_args(next(field.type for field in dataclasses.fields(TrainConfig) if field.name == "task"))
_PROGRAM = Program("train.main")
_NONE = "none"
# what timm's train.py, DeiT's and IBM's main.py call some settings
_MEANT = {
    "--model": "--variant",
    "--arch": "--variant",
    "--pretrained": "--init SOURCE",
    "--initial-checkpoint": "--init SOURCE",
    "--finetune": "--init SOURCE",
    "--data": "--dataset folder:PATH",
    "--data-path": "--dataset folder:PATH",
    "--data-set": "--dataset",
    "--num-classes": "told by the data",
    "--img-size": "--image-size",
    "--input-size": "--image-size",
    "-b": "--batch-size",
    "-j": "--workers",
    "--num-workers": "--workers",
    "--num_workers": "--workers",
    "--opt": "--optimizer",
    "--lr-base": "--lr",
    "--learning-rate": "--lr",
    "--sched": "--lr-schedule",
    "--drop": "--dropout",
    "--aa": "--auto-augment",
    "--scale": "--crop-scale",
    "--ratio": "--crop-ratio",
    "--reprob": "--erase-prob",
    "--aug-repeats": "--repeated-aug",
    "--mixup-prob": "--mix-prob",
    "--mixup-switch-prob": "--cutmix-share",
    "--bce-loss": "--loss bce",
    "--grad-accum-steps": "--grad-accum",
    "--kd-model-name": "--distill SOURCE",
    "--teacher-model": "--distill SOURCE",
    "--teacher-path": "--distill SOURCE",
    "--distill-loss-weight": "--distill-alpha",
    "--distillation-alpha": "--distill-alpha",
    "--kd-temperature": "--distill-temperature",
    "--distillation-tau": "--distill-temperature",
    "--amp": "--precision bfloat16",
    "--amp-dtype": "--precision",
    "--model-ema": "--ema-decay 0.9998",
    "--model-ema-decay": "--ema-decay",
    "--log-interval": "--log-every",
    "--log-wandb": "--wandb PROJECT",
    "--experiment": "--output FOLDER",
}
# fields that --config does not take over: what this process writes, and who it is
_OWN = ("output", "resume", "coordinator", "num_processes", "process_id")
_EXAMPLES = """\
examples:
  python -m train.main --variant s --dataset folder:photos --init hf-hub:timm/crossvit_small_240.in1k
  python -m train.main --config runs/X/config.json --lr 0.0005 --output runs/lower-lr
  python -m train.main --task pretraining --variant s --dataset folder:pictures --output runs/pre
  python -m train.main --init runs/pre --dataset folder:photos"""


def parse_flags(argv: Sequence[str]) -> TrainConfig:
    """The settings that a command line asks for. A mistake in it prints one line and exits with 2."""
    early = Parser(prog=_PROGRAM, add_help=False)
    early.add_argument("--recipe", choices=RECIPES)
    early.add_argument("--config", type=home_path)
    early.add_argument("--task", choices=_TASKS)
    early.add_argument("--method")
    early.add_argument("--dataset")
    early.add_argument("--init")
    known, _ = early.parse_known_args(argv)
    try:
        base = _base(known)
    except SettingsError as error:
        early.error(str(error))
    parser = Parser(
        prog=_PROGRAM,
        description="Train a CrossViT. With no --dataset: on the handwritten digits that scikit-learn carries, or\n"
        "with --task detection or segmentation on scenes that are drawn of them.",
        epilog=_epilog(base, known.config),
        meant=_MEANT,
    )
    add_settings(parser, base)
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=home_path,
        default=argparse.SUPPRESS,
        help="a run's config.json, whose settings are the defaults in place of a recipe's",
    )
    given = vars(parser.parse_args(argv))
    given.pop("config", None)
    try:
        if given.get("resume") is not None and not Path(given["resume"]).is_file():
            if known.config is not None:
                raise SettingsError("a run that is resumed has its settings: leave --config out")
            return _resumed(given.pop("resume"), given)
        return apply_flags(base, given)
    except SettingsError as error:
        parser.error(str(error))


def _base(known: argparse.Namespace) -> TrainConfig:
    """The settings that those given stand in: a recipe, or what a run was begun with."""
    if known.config is None:
        kind = "dino" if (known.task, known.method) == ("pretraining", "dino") else known.task or _TASKS[0]
        return RECIPES[known.recipe or _usual_recipe(kind, known.dataset, known.init)]
    if known.recipe is not None:
        raise SettingsError("--config and --recipe are both sets of defaults: leave one out")
    return dataclasses.replace(read_settings_file(known.config), **dict.fromkeys(_OWN))


def _epilog(base: TrainConfig, file: str | None) -> str:
    whose = f"the recipe {base.recipe!r}" if file is None else file
    notes = (
        f"The defaults shown are those of {whose}. Recipes: digits is the default for the digits; for other data "
        "finetune with --init, imagenet without; for another --task the recipe of its name, for --method dino that of "
        "the method. 'none' is a value where it is shown.",
        "Ctrl-C and SIGTERM save, a second one ends at once; SIGHUP (a closed terminal) and SIGUSR1 (a scheduler's "
        "warning) save.",
        "exit status: 0 done; 1 training failed; 2 a mistake in what was asked for; 128 and the number of the signal "
        "after one: 130 after Ctrl-C",
    )
    return "\n\n".join(
        [_EXAMPLES, *(textwrap.fill(note, 100, break_long_words=False, break_on_hyphens=False) for note in notes)]
    )


def _usual_recipe(task: str, dataset: str | None, init: str | None) -> str:
    if task != "classification":
        return f"{task}-digits" if dataset in (None, _DIGITS) else task
    if dataset in (None, _DIGITS):
        return "digits"
    return "imagenet" if init is None else "finetune"


def add_settings(parser: argparse.ArgumentParser, recipe: TrainConfig) -> None:
    """Add a flag for every field of `TrainConfig`, those of every day first and the others in titled groups.

    Flags that are not given stay out of what is parsed.
    """
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["section"]:
            group = parser.add_argument_group(field.metadata["section"])
        place = parser if field.name in _EVERYDAY else group
        flag = "--" + field.name.replace("_", "-")
        shown = f"{field.metadata['help']} (default: {_shown(getattr(recipe, field.name))})".replace("%", "%%")
        if field.metadata["parse"] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": _parser_of(field), "metavar": _values_of(field)}
            how |= {"nargs": "+", "action": _Tuple} if field.metadata["many"] else {}
        place.add_argument(flag, default=argparse.SUPPRESS, help=shown, **how)


def _nothing(field: dataclasses.Field) -> Any:
    """What the text `none` stands for, or `...` where it is no value, or a word like others: of `reduce_tokens` that of
    all tokens, where the weights have fewer."""
    if field.name == "reduce_tokens":
        return ...
    if type(None) in get_args(field.type) or None in get_args(field.type):
        return None
    return "" if field.name == "auto_augment" else ...


def _parser_of(field: dataclasses.Field) -> Callable[[str], Any]:
    """`field.metadata["parse"]`, which keeps its name in argparse's messages, and `none` where that is a value."""
    parse, nothing = field.metadata["parse"], _nothing(field)

    @functools.wraps(parse)
    def parse_or_nothing(text: str) -> Any:
        return nothing if text == _NONE else parse(text)

    return parse if nothing is ... else parse_or_nothing


def _values_of(field: dataclasses.Field) -> str:
    """The choices of a flag, or the name of its value; with `none` where that is one."""
    choices = [text for text in get_args(field.type) if isinstance(text, str)]
    values = choices or [field.name.upper()]
    values += [_NONE] * (_nothing(field) is not ... or field.name == "reduce_tokens")
    return f"{{{','.join(values)}}}" if choices else "|".join(values)


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, None if values == [None] else tuple(values))


def apply_flags(recipe: TrainConfig, given: dict) -> TrainConfig:
    """The recipe with the given settings instead of its own. Raises SettingsError for a value that will not do."""
    if "epochs" in given and "warmup_epochs" not in given:
        given = given | {"warmup_epochs": recipe.warmup_epochs * max(0, given["epochs"]) // recipe.epochs}
    if "branches" in given:  # each of which has its own
        given = {"image_scale": None} | given
    return dataclasses.replace(recipe, **given)


def _resumed(folder: str, given: dict) -> TrainConfig:
    if Path(given.get("output", folder)) != Path(folder):
        raise SettingsError(f"--resume {folder} and --output {given['output']} name two folders")
    return dataclasses.replace(read_settings(folder), **given)


def _shown(value) -> str:
    if value is None or value == "":
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, float):
        short = f"{value:g}"  # or what gives the very number again
        return short if float(short) == value else str(Fraction(value).limit_denominator(1000))
    return str(value)
