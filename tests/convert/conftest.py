"""A small timm model whose every parameter is perturbed: fresh biases are zero, and would hide what gets lost."""

import logging
import shutil
from pathlib import Path

import pytest
import timm
import torch

from convert import load_weights, save
from convert.__main__ import main
from crossvit_torch import create_model
from tests.command_line import refusal

TIMM_SETTINGS = {"num_classes": 10, "img_size": 48, "img_scale": (1.0, 2 / 3)}
CLASS_NAMES = tuple(f"klasse {i} ä" for i in range(5))


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny() -> torch.nn.Module:
    """timm's own Ti at 48 pixels, freshly made."""
    return timm.create_model("crossvit_tiny_240", **TIMM_SETTINGS)


def run(capsys, *args):
    """`python -m convert` with these arguments: status, standard output and error."""
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *args):
    """The one line of a refusal."""
    return refusal(capsys, "python -m convert", main, *args)


@pytest.fixture(scope="session")
def timm_model() -> torch.nn.Module:
    return perturb(tiny())


@pytest.fixture
def state(timm_model) -> dict[str, torch.Tensor]:
    """A copy, for tests that change it."""
    return {name: tensor.clone() for name, tensor in timm_model.state_dict().items()}


@pytest.fixture
def images() -> torch.Tensor:
    """Normalised images, channels first."""
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits(timm_model, images) -> torch.Tensor:
    """What timm makes of them."""
    with torch.inference_mode():
        return timm_model(images)


@pytest.fixture(scope="session")
def _saved(timm_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "weights.pth"
    torch.save(timm_model.state_dict(), path)
    return path


@pytest.fixture
def weights_file(_saved, tmp_path):
    """timm's state dict as torch.save writes it; a copy, for tests that change it."""
    return Path(shutil.copy(_saved, tmp_path))


@pytest.fixture(scope="session")
def weights(_saved):
    """What the file holds; not to be changed."""
    return load_weights(_saved)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A file of a model of one stage, which exporters are quick with; not to be changed."""
    model = perturb(create_model("ti", image_size=48, image_scale=(1.0, 2 / 3), num_classes=5, stages=1, depth=(1, 1)))
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    return save(model.state_dict(), model.config, path, class_names=CLASS_NAMES)


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.WARNING, logger="convert")
