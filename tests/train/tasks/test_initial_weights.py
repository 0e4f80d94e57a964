"""The weights that a run starts from, made to fit it."""

import numpy as np
import pytest
import torch
from timm.models._manipulate import adapt_input_conv

import convert
from crossvit_torch import CrossViT
from tests.small_model import small_config
from train.config import TrainConfig
from train.tasks.classification import initial_weights


@pytest.mark.parametrize(
    ("trained", "asked"), [("apply", "keep"), ("apply", "apply"), ("keep", "keep"), (None, "keep")]
)
def test_weights_of_turned_images_are_told_where_a_run_turns_none(tmp_path, trained, asked):
    config = small_config(3)
    path = convert.save(
        CrossViT(config).state_dict(), config, tmp_path / "weights.safetensors", class_names="abc", exif=trained
    )
    notes = initial_weights(TrainConfig(init=str(path), exif=asked), tuple("abc")).notes
    told = [note for note in notes if "--exif apply turns them" in note]
    assert len(told) == (trained == "apply" and asked == "keep")


@pytest.mark.parametrize("multi_conv", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
def test_weights_for_other_channels_are_adapted_as_timm_does_and_that_is_told(
    small_variant, tmp_path, channels, multi_conv
):
    config = small_config(3).replace(in_chans=channels, multi_conv=multi_conv)
    state = CrossViT(config).state_dict()
    path = convert.save(state, config, tmp_path / "weights.safetensors", class_names="abc")
    weights = initial_weights(TrainConfig(init=str(path)), tuple("abc"))
    assert weights.config.in_chans == 3
    first = [f"patch_embed.{branch}.proj{'.0' * multi_conv}.weight" for branch in (0, 1)]
    for name, tensor in state.items():
        expected = adapt_input_conv(3, tensor, base_chans=channels) if name in first else tensor
        np.testing.assert_allclose(weights.tensors[name], expected, rtol=1e-6)
    assert f"first convolutions repeated and scaled from {channels} to 3 channels" in weights.notes
    CrossViT(weights.config).load_state_dict({name: torch.tensor(x) for name, x in weights.tensors.items()})
