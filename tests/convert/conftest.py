"""A small timm model whose every parameter is perturbed: fresh biases are zero, and would hide what gets lost."""

import logging

import pytest
import timm
import torch

TIMM_SETTINGS = {"num_classes": 10, "img_size": 48, "img_scale": (1.0, 2 / 3)}


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny() -> torch.nn.Module:
    """timm's own Ti at 48 pixels, freshly made."""
    return timm.create_model("crossvit_tiny_240", **TIMM_SETTINGS)


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


@pytest.fixture
def weights_file(state, tmp_path):
    """timm's state dict as torch.save writes it."""
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.WARNING, logger="convert")
