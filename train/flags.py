"""Command-line flags: one for every field of `TrainConfig`, with the chosen recipe's values as defaults."""

import argparse
import dataclasses
from collections.abc import Sequence

from convert.command_line import Parser
from train.config import RECIPES, SettingsError, TrainConfig

_DIGITS = "digits"  # the data set that has a recipe of its own


def parse_flags(argv: Sequence[str]) -> TrainConfig:
    """The settings that a command line asks for. A mistake in it prints one line and exits with 2."""
    recipe = _chosen_recipe(argv)
    parser = _parser(recipe)
    given = vars(parser.parse_args(argv))
    if "epochs" in given and "warmup_epochs" not in given:
        given["warmup_epochs"] = recipe.warmup_epochs * max(0, given["epochs"]) // recipe.epochs
    try:
        return dataclasses.replace(recipe, **given)
    except SettingsError as error:
        parser.error(str(error))


def _chosen_recipe(argv: Sequence[str]) -> TrainConfig:
    """The recipe named on the command line, or else the one that fits the data set."""
    early = Parser(prog=_PROGRAM, add_help=False)
    early.add_argument("--recipe", choices=RECIPES)
    early.add_argument("--dataset", default=_DIGITS)
    known, _ = early.parse_known_args(argv)
    return RECIPES[known.recipe or (_DIGITS if known.dataset == _DIGITS else "imagenet")]


_PROGRAM = "python -m train.main"


def _parser(recipe: TrainConfig) -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Train a CrossViT. With no --dataset: on the handwritten digits that scikit-learn carries.",
        epilog=f"The defaults shown are those of the recipe {recipe.recipe!r}. Recipes: {', '.join(RECIPES)}; "
        "digits is the default for the digits, imagenet for all other data.",
    )
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.metadata["parse"],
            # unset flags stay away, so that it is known which were given
            default=argparse.SUPPRESS,
            metavar=field.name.upper(),
            help=f"{field.metadata['help']} (default: {_shown(getattr(recipe, field.name))})".replace("%", "%%"),
        )
    return parser


def _shown(value) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, tuple):
        return ",".join(f"{part:.4g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
