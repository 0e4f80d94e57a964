"""From encoded images to augmented ones, on the host and on the device."""
