"""A server of the shrunk model in this process, and one whose engine does as a test says."""

import contextlib
import io
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from tests.small_model import small_config
from tests.train.small_weights import save_small
from train.images.transforms import eval_transform
from train.inference.model import load_classifier
from train.inference.server.app import Service, make_app
from train.inference.server.engines.jax_engine import JaxEngine
from train.inference.server.limits import Limits
from train.inference.server.run import Connection

CLASSES = "abcdefgh"


class ToldEngine:
    """Computes nothing: the probability of class 0 is the image's mean. Waits for `go` where a test wishes that."""

    platform, headline, explains = "none", "an engine for tests", False
    config, class_names = small_config(2), ("dark", "bright")

    def __init__(self, sizes=(1, 2, 4)):
        self.sizes = sizes
        self.transform = eval_transform(self.config)
        self.go, self.began = threading.Event(), threading.Event()
        self.go.set()
        self.batches = []
        self.fails = False

    def compile(self):
        pass

    def compute(self, images):
        self.batches.append(len(images))
        self.began.set()
        assert self.go.wait(60)
        if self.fails:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        means = images.mean((1, 2, 3))
        return np.stack([means, 1 - means], 1).astype(np.float32)


def encoded(size=(60, 50), seed=0, kind="PNG"):
    """A picture of a size (width, height)."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def serving():
    """serving(engine, **limits) is a client of a server that is ready."""
    clients = []

    def start(engine, *, log=None, **limits):
        service = Service(engine, Limits(**{"pictures": 64} | limits))
        client = TestClient(make_app(service, log=log), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        client.service = service
        client.portal.call(service.start)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory):
    return str(save_small(tmp_path_factory.mktemp("served") / "w.safetensors", CLASSES))


@pytest.fixture(scope="session")
def small_engine(small_weights):
    engine = JaxEngine(load_classifier(small_weights, precision="float32"), 4, explains=True)
    engine.compile()
    engine.compile = lambda: None  # once for all tests
    return engine


@contextlib.contextmanager
def _listening(service, **settings):
    config = uvicorn.Config(make_app(service), http=Connection, log_config=None, lifespan="on", **settings)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.001)
    service.starting = False  # the engine is compiled already
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def listening():
    """`with listening(service) as address` has a server for clients that are not ours."""
    return _listening


@pytest.fixture(scope="session")
def address(small_engine):
    """Where a server of the shrunk model listens."""
    with _listening(Service(small_engine, Limits(pictures=16))) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; where there is none, tests of it are skipped."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with its driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser
