"""One branch of a CrossViT, and the bounds of all settings."""

import re
from dataclasses import dataclass
from fractions import Fraction

# bounds of what can be asked for, far above any model; what a machine can compute is found later
LARGEST = 2**16  # pixels, channels
DEEPEST = 2**10  # blocks of a stage, stages
BRANCH_SETTINGS = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "image_scale")


def read_fraction(text: str) -> Fraction:
    """The number in a text such as `14/15` or `0.5`.

    Raises ValueError for any other text, also for numbers that are longer than anybody would write: Python's own
    `Fraction` computes all digits of 1e99999999.
    """
    if not _FRACTION.fullmatch(text.strip()):
        raise ValueError(text)
    try:
        return Fraction(text)
    except ZeroDivisionError:
        raise ValueError(text) from None


_FRACTION = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})(e[+-]?\d{1,2}|/\d{1,20})?", re.ASCII | re.IGNORECASE)


def require_whole(field: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{field} must be a whole number from {least} to {most}; got {shown_value(value)}")


def require_number(field: str, value: object, *, above: int, at_most: int) -> None:
    if not isinstance(value, int | float | Fraction) or isinstance(value, bool) or not above < value <= at_most:
        raise ValueError(f"{field} must be a number above {above}, at most {at_most}; got {shown_value(value)}")


def shown_value(value: object) -> str:
    """A value for a message: as Python writes it, at most 100 characters of it."""
    text = f"{value}" if isinstance(value, Fraction) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch: a transformer over the patches of one size.

    As text, which `Branch.parse` reads: "embed_dim=192,depth=1:2:1,num_heads=3,mlp_ratio=4,patch_size=16,
    image_scale=14/15", where colons part the depths of the stages.

    Raises ValueError for settings that make no branch, naming the value and what is accepted.
    """

    embed_dim: int
    depth: int | tuple[int, ...]  # transformer blocks per stage; a tuple has one number for each stage
    num_heads: int
    mlp_ratio: int | float = 4.0
    patch_size: int
    image_scale: int | float | Fraction = 1  # share of the image size that the branch sees; becomes a Fraction

    def __post_init__(self):
        for field in ("embed_dim", "num_heads", "patch_size"):
            require_whole(field, getattr(self, field), 1, LARGEST)
        for depth in self.depth if isinstance(self.depth, tuple) else (self.depth,):
            require_whole("depth", depth, 1, DEEPEST)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} cannot be cut into num_heads {self.num_heads}")
        require_number("mlp_ratio", self.mlp_ratio, above=0, at_most=LARGEST)
        require_number("image_scale", self.image_scale, above=0, at_most=LARGEST)
        # timm writes a float (224/240), a fraction makes every size exact
        object.__setattr__(self, "image_scale", Fraction(self.image_scale).limit_denominator(1024))
        require_number("image_scale", self.image_scale, above=0, at_most=LARGEST)

    def __str__(self):
        depth = ":".join(map(str, self.depth if isinstance(self.depth, tuple) else (self.depth,)))
        values = {name: getattr(self, name) for name in BRANCH_SETTINGS}
        values |= {"depth": depth, "mlp_ratio": repr(float(self.mlp_ratio)).removesuffix(".0")}
        return ",".join(f"{name}={value}" for name, value in values.items())

    @classmethod
    def parse(cls, text: str) -> "Branch":
        """The branch that a text describes; only `mlp_ratio` and `image_scale` may be left out.

        Raises ValueError, naming what is wrong.
        """
        settings = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in BRANCH_SETTINGS or name in settings:
                why = "is there twice" if name in settings else f"is none of {', '.join(BRANCH_SETTINGS)}"
                raise ValueError(f"{name!r} {why}")
            try:
                settings[name] = _READERS.get(name, int)(value)
            except (ValueError, ArithmeticError):
                raise ValueError(f"{name} cannot be {value!r}") from None
        missing = [name for name in ("embed_dim", "depth", "num_heads", "patch_size") if name not in settings]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given, as in {EXAMPLE}")
        return cls(**settings)


def _depth(text: str) -> int | tuple[int, ...]:
    depths = tuple(map(int, text.split(":")))
    return depths if len(depths) > 1 else depths[0]


_READERS = {"depth": _depth, "mlp_ratio": float, "image_scale": read_fraction}
EXAMPLE = "embed_dim=96,depth=1,num_heads=3,mlp_ratio=4,patch_size=12,image_scale=1"
