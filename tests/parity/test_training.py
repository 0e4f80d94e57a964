"""Twenty training steps: timm + torch.optim against Flax + optax, from the same weights, batches and rates."""

from tests.parity.training import clipped_and_averaged_errors, training_errors


def test_twenty_steps_in_float64_end_at_timms_weights():
    errors = training_errors("float64")
    assert errors["moved"] > 1e-4, "every parameter must have been trained"
    assert errors["loss"] <= 1e-9
    assert errors["parameters"] <= 1e-8


def test_twenty_steps_in_float32_follow_timms_losses():
    errors = training_errors("float32")
    assert errors["moved"] > 1e-4
    assert errors["loss"] <= 1e-4


def test_clipped_steps_in_float64_end_at_timms_weights_and_at_its_average_of_them():
    errors = clipped_and_averaged_errors()
    assert errors["moved"] > 1e-4 and errors["lag"] > 1e-4 and errors["clipped"] > 0.5
    assert errors["loss"] <= 1e-9
    assert errors["parameters"] <= 1e-8
    assert errors["average"] <= 1e-8
