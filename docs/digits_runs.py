"""Runs and evaluations that the scripts beside this file are made of, in this process; what is there is kept."""

import contextlib
import io
import json
from pathlib import Path


def trained(*flags: object, output: Path) -> Path:
    """The folder of a run of `train.main`. Ends the program if it fails."""
    from train.main import main

    if not (output / "weights.safetensors").exists() and main(_texts(*flags, f"--output={output}")) != 0:
        raise SystemExit(f"the run in {output} failed")
    return output


def evaluated(*flags: object, output: Path) -> dict[str, object]:
    """The figures of `train.evaluate`, and as `printed` what it printed. Ends the program if it fails."""
    from train.evaluate import main

    printed = output / "printed.txt"
    if not printed.exists():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = main(_texts(*flags, f"--output={output}"))
        if status != 0:
            raise SystemExit(f"the evaluation in {output} failed")
        printed.write_text(out.getvalue())
    return json.loads((output / "evaluation.json").read_text()) | {"printed": printed.read_text()}


def _texts(*flags: object) -> list[str]:
    return list(map(str, flags))
