"""The command `python -m benchmarks.training`: one training step, Flax against timm.

A step is Mixup or CutMix (none in odd batches: timm mixes images in pairs), forward, soft-target cross-entropy,
backward, AdamW: on our side the trainer's own jitted and donated step, on timm's what its train.py does. On a GPU only
the last step of a round is waited for, as in a real run. In bfloat16 both sides keep float32 parameters.
"""

from benchmarks.inference import main
from convert.command_line import leave

if __name__ == "__main__":
    leave(main(benchmark="training"))
