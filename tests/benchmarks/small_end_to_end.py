"""`python -m tests.benchmarks.small_end_to_end`: the benchmark with flags, on a model that compiles in seconds.

The processes of its sides import this module as their main one, and so have that model too.
"""

import sys

from benchmarks import end_to_end
from benchmarks.sides import timm as timm_side
from crossvit_jax.config import VARIANTS
from tests.benchmarks.brief import BriefEndToEndTask
from tests.train.small_weights import save_small, small_config, small_timm_model

_CLASSES = 1000

end_to_end.EndToEndTask = BriefEndToEndTask
VARIANTS["ti"] = small_config(_CLASSES)
timm_side._model = lambda task: small_timm_model(_CLASSES)
timm_side.write_weights = lambda variant, path: save_small(path, None, classes=_CLASSES)

if __name__ == "__main__":
    sys.exit(end_to_end.main())
