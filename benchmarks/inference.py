"""The command `python -m benchmarks.inference`: images to logits, Flax against timm.

On a CPU every call is waited for before the next one starts; on a GPU, where that would time how calls are started,
only the last of a round. In bfloat16 both sides keep parameters and images in bfloat16; in float32 neither may round
matrix products to TF32.
"""

from benchmarks.command import main
from convert.command_line import leave

if __name__ == "__main__":
    leave(main("inference"))
