import importlib.util
import io
import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from PIL import Image
from sklearn.datasets import load_sample_images

from crossvit_jax.config import VARIANTS
from train.cost import slices
from train.data.datasets import open_digits

QUICK = {"xla_backend_optimization_level": 0}  # for what a fixture of a module compiles, before `compile_quickly`


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Runs of these tests that need the same program share one compilation, also where `pytest -n` parts them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled-programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(autouse=True)
def compile_quickly():
    """What these tests compile runs for moments; how fast it would be does not matter."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data folder in which the digits are prepared."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    open_digits(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def photo():
    """Some encoded picture that is neither square nor small, with structure at every scale."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:90, :130]
    waves = [127 + 90 * np.sin(rows / a + columns / b) for a, b in ((9, 31), (17, 5), (40, 13))]
    pixels = np.stack(waves, -1) + rng.normal(0, 12, (90, 130, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def photographs():
    """Two real photographs, 640 × 427: a temple before the sky, and a flower."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture
def image_folder(tmp_path):
    """Writes an image file: image_folder("train/cat/1.png") below the folder that it returns for no path."""

    def write(path=None, *, size=(20, 16), seed=0):
        if path is None:
            return tmp_path
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        return file

    return write


@pytest.fixture
def small_variant(monkeypatch):
    """The variant `ti` shrunk until it compiles in seconds."""
    shrink(monkeypatch.setitem)


def shrink(set_item):
    config = VARIANTS["ti"].replace(embed_dim=(12, 24), depth=(1, 1), num_heads=(2, 2), mlp_ratio=(2.0, 2.0), stages=1)
    set_item(VARIANTS, "ti", config)


@pytest.fixture
def without_tpu(monkeypatch):
    """The environment in which TPUs that are not there are compiled for; as it was afterwards. Skips without libtpu."""
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        pytest.skip("needs libtpu: pip install 'crossvit-jax[tpu]'")
    for name, value in slices._ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
