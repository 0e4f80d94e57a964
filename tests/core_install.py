"""What the core alone can do: run by `.ci/run` in an environment of its own, without pytest and without any extra.

`python -I tests/core_install.py` in an empty folder, with the Python of an environment in which `pip install .` was
done; -I, or this folder's `convert` would be found for ours.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

import convert
from convert.errors import MissingExtra
from crossvit_jax import Branch, CrossViT, CrossViTConfig, preprocess_image
from crossvit_jax.extras import EXTRAS

_BROUGHT_BY_FLAX = {"optax", "orbax", "yaml", "prometheus_client"}  # by flax and what it needs
_CONFIG = CrossViTConfig(
    name="custom",
    branches=(
        Branch(embed_dim=12, depth=1, num_heads=2, patch_size=12),
        Branch(embed_dim=24, depth=1, num_heads=2, patch_size=16, image_scale=2 / 3),
    ),
    image_size=48,
    num_classes=3,
)


def _crossvit(*arguments: str) -> tuple[int, str]:
    command = [str(Path(sys.executable).parent / "crossvit"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    print("$ crossvit", *arguments, f"\n{done.stdout}{done.stderr}")
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    extras = {package for packages in EXTRAS.values() for package in packages} - _BROUGHT_BY_FLAX
    there = [package for package in sorted(extras) if importlib.util.find_spec(package) is not None]
    assert not there, f"the core brings what is an extra's: {there}"

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save("photo.png")
    model = CrossViT(_CONFIG, rngs=nnx.Rngs(0))
    model.eval()
    logits = model(preprocess_image("photo.png", model.config)[None])
    convert.save(model, _CONFIG, "model.flax.safetensors", class_names=("a", "b", "c"))

    for source, destination in (("model.flax.safetensors", "timm.safetensors"), ("timm.safetensors", "orbax")):
        assert _crossvit("convert", source, destination)[0] == 0
        again = convert.load_flax(destination)
        np.testing.assert_array_equal(again(preprocess_image("photo.png", again.config)[None]), logits)
    [best, *_] = convert.predict("timm.safetensors", ["photo.png"])[0]
    assert best.class_name == "abc"[int(logits.argmax())]
    status, told = _crossvit("predict", "--weights", "timm.safetensors", "photo.png")
    assert status == 0 and best.class_name in told.split()

    for arguments, extra in (
        (("convert", "timm.safetensors", "x.pth"), "torch"),
        (("convert", "timm.safetensors", "x.onnx"), "onnx"),
        (("predict", "--weights", "timm.safetensors", "photo.png", "--attention", "maps"), "train"),
        (("train",), "train"),
        (("serve", "--weights", "timm.safetensors"), "serve"),
    ):
        status, told = _crossvit(*arguments)
        assert status == 2 and told.count("\n") == 1 and f"pip install -e '.[{extra}]'" in told
    try:
        convert.load_torch("timm.safetensors")
    except MissingExtra as error:
        assert "pip install -e '.[torch]'" in str(error)
    else:
        raise AssertionError("load_torch works without torch")
    print("the core converts, loads and predicts")


if __name__ == "__main__":
    main()
