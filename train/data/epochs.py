"""How long an epoch is."""

_REPEAT_ROUND = 256  # DeiT's sampler leaves out what does not fill so many places


def steps_per_epoch(images: int, batch_size: int, repeats: int = 1) -> int:
    """Whole batches in an epoch; the rest is left out, another rest in each epoch.

    With repeated augmentation an epoch has as many places as without, but rounded down to a multiple of 256, as in
    DeiT's sampler. That one has no places at all for fewer than 256 images; here they all count, as in timm's.
    """
    places = images // _REPEAT_ROUND * _REPEAT_ROUND if repeats > 1 and images >= _REPEAT_ROUND else images
    return places // batch_size
