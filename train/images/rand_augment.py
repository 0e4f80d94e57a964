"""timm's RandAugment strings, such as `rand-m9-mstd0.5-inc1`, for augmenting on the device. Imports no framework."""

import dataclasses
import re
from dataclasses import dataclass

from convert.errors import SettingsError
from train.config import TrainConfig

ACCEPTED = "rand with -mN (0 to 10), -mstdX (up to 100), -nN, -pX or -inc1, such as rand-m9-mstd0.5-inc1, or none"

_FIELD = re.compile(r"(mstd|m|n|p)([0-9]+(?:\.[0-9]*)?)|(inc)([01])")


@dataclass(frozen=True)
class RandAugment:
    """What timm's `rand_augment_transform` takes from a string; the defaults are its own."""

    magnitude: int = 10  # of 10
    noise: float = 0.0  # standard deviation of the magnitude
    layers: int = 2  # operations drawn for an image
    prob: float = 0.5  # with which each of them is applied
    increasing: bool = False  # every operation changes the more, the higher the magnitude


def parse_rand_augment(text: str) -> RandAugment:
    """The settings in a string; an empty one has no layers. Raises ValueError for anything but what is `ACCEPTED`."""
    if not text:
        return RandAugment(layers=0)
    name, *fields = text.split("-")
    found = [_FIELD.fullmatch(field) for field in fields]
    if name != "rand" or not all(found):
        raise ValueError(text)
    values = {match[1] or match[3]: match[2] or match[4] for match in found}
    if len(values) < len(found):
        raise ValueError(text)
    settings = RandAugment(
        magnitude=int(values.get("m", 10)),
        noise=float(values.get("mstd", 0)),
        layers=int(values.get("n", 2)),
        prob=float(values.get("p", 0.5)),
        increasing=bool(int(values.get("inc", 0))),
    )
    if settings.magnitude > 10 or settings.noise > 100 or settings.prob > 1:
        raise ValueError(text)
    return settings


def device_can_augment(config: TrainConfig) -> bool:
    """Whether the device knows what is to be done to images; the host knows all that timm does."""
    try:
        check_augment_on(dataclasses.replace(config, augment_on="device"))
    except SettingsError:
        return False
    return True


def check_augment_on(config: TrainConfig) -> None:
    """Raises SettingsError if the device is to augment images by what it does not know."""
    if config.augment_on == "device" and config.color_jitter:
        raise SettingsError(f"augment_on device knows no color_jitter; got {config.color_jitter:g}")
    if config.augment_on == "device":
        try:
            parse_rand_augment(config.auto_augment)
        except ValueError:
            raise SettingsError(
                f"augment_on device takes as auto_augment {ACCEPTED}; got {config.auto_augment!r}"
            ) from None
