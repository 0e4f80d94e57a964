"""Command-line flags: one for every field of `TrainConfig`, with the chosen recipe's values as defaults."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from convert.command_line import Parser
from convert.errors import SettingsError
from train.config import TrainConfig
from train.recipes import RECIPES
from train.run.folder import read_settings

# the flags that --help tells first; the others stand in the groups of their settings
_EVERYDAY = ("task", "variant", "init", "resume", "dataset", "data_dir", "recipe", "output", "seed", "image_size")
_EVERYDAY += ("epochs", "batch_size", "lr", "precision")
_DIGITS = "digits"  # the data set that has recipes of its own
_TASKS = get_args(next(field.type for field in dataclasses.fields(TrainConfig) if field.name == "task"))
_PROGRAM = "python -m train.main"


def parse_flags(argv: Sequence[str]) -> TrainConfig:
    """The settings that a command line asks for. A mistake in it prints one line and exits with 2."""
    early = Parser(prog=_PROGRAM, add_help=False)
    early.add_argument("--recipe", choices=RECIPES)
    early.add_argument("--task", choices=_TASKS)
    early.add_argument("--dataset")
    early.add_argument("--init")
    known, _ = early.parse_known_args(argv)
    recipe = RECIPES[known.recipe or _usual_recipe(known.task or _TASKS[0], known.dataset, known.init)]
    parser = Parser(
        prog=_PROGRAM,
        description="Train a CrossViT. With no --dataset: on the handwritten digits that scikit-learn carries, or with "
        "--task detection or segmentation on scenes that are drawn of them.",
        epilog=f"The defaults shown are those of the recipe {recipe.recipe!r}. Recipes: {', '.join(RECIPES)}; "
        "digits is the default for the digits; for other data finetune with --init, imagenet without; for another "
        "--task the recipe of its name. Ctrl-C and SIGTERM save, a second one ends at once; SIGHUP (a closed terminal) "
        "and SIGUSR1 (a scheduler's warning) save. Exit status: 0 done; 1 training failed; 2 a mistake in what was "
        "asked for; 128 and the number of the signal after one: 130 after Ctrl-C.",
    )
    add_settings(parser, recipe)
    given = vars(parser.parse_args(argv))
    try:
        if "resume" in given and not Path(given["resume"]).is_file():
            return _resumed(given.pop("resume"), given)
        return apply_flags(recipe, given)
    except SettingsError as error:
        parser.error(str(error))


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
            how = {"type": field.metadata["parse"], "metavar": field.name.upper()}
            how |= {"nargs": "+", "action": _Tuple} if field.metadata["many"] else {}
        place.add_argument(flag, default=argparse.SUPPRESS, help=shown, **how)


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


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
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(f"{part:.4g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
