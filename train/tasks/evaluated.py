"""What evaluations leave in a folder."""

import json
from pathlib import Path


def is_evaluation(file: Path, metric: str) -> bool:
    """Whether it has the numbers of an evaluation by that metric."""
    try:
        numbers = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(numbers, dict) and {"weights", "dataset", "images", metric} <= numbers.keys()
