"""`python -m tests.benchmarks.small_end_to_end`: the benchmark with flags, on a model that compiles in seconds."""

import sys
from pathlib import Path

if __name__ == "__main__":  # not in the processes of its sides
    from benchmarks import end_to_end
    from crossvit_jax.config import VARIANTS
    from tests.benchmarks.brief import CLASSES, BriefEndToEndTask
    from tests.small_model import small_config
    from tests.train.small_weights import save_small

    end_to_end.EndToEndTask = BriefEndToEndTask
    VARIANTS["ti"] = small_config(CLASSES).replace(name="ti")
    BriefEndToEndTask.write_weights = lambda task: save_small(Path(task.weights), None, classes=CLASSES)
    sys.exit(end_to_end.main())
