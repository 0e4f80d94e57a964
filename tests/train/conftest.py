import importlib.util
import io
import os

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from convert.errors import MissingExtra
from tests.small_model import shrink
from tests.train.prepared_digits import prepare_digits
from train.cost import gpus, slices


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data folder in which the digits are prepared."""
    return prepare_digits(tmp_path_factory.mktemp("tensorflow_datasets"))


@pytest.fixture(scope="session")
def few_digits_dir(tmp_path_factory):
    """The same with 224 digits for training and 57 held out, for runs of which only the course matters."""
    digits = load_digits()
    for values in ("images", "target"):
        digits[values] = digits[values][:281]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_digits", lambda: digits)
        return prepare_digits(tmp_path_factory.mktemp("few_digits"))


@pytest.fixture
def no_curves(monkeypatch):
    """The runs of this process draw no curves, which takes seconds."""
    monkeypatch.setattr("train.loop.draw_curves", lambda *_: None)


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


@pytest.fixture
def without_gpu(monkeypatch):
    """The environment in which GPUs that are not there are compiled for. Skips without the wheels for that."""
    for name, value in gpus._ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    try:
        gpus.prepare_environment()
    except MissingExtra as error:
        pytest.skip(str(error))
    platforms = jax.config.jax_platforms  # jax has read the environment already
    jax.config.update("jax_platforms", "cpu")
    yield
    jax.config.update("jax_platforms", platforms)


@pytest.fixture
def without_tpu(monkeypatch):
    """The environment in which TPUs that are not there are compiled for; as it was afterwards. Skips without libtpu."""
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")
    for name, value in slices._ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
