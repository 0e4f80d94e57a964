"""What evaluations leave in a folder."""

from pathlib import Path

from crossvit_jax.files import read_json


def is_evaluation(file: Path, metric: str) -> bool:
    """Whether it has the numbers of an evaluation by that metric."""
    try:
        numbers = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(numbers, dict) and {"weights", "dataset", "images", metric} <= numbers.keys()
