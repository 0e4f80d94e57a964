"""One branch of a CrossViT, and the bounds of all settings."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

# bounds of what can be asked for, far above any model; what a machine can compute is found later
LARGEST = 2**16  # pixels, channels
DEEPEST = 2**10  # blocks of a stage, stages
BRANCH_SETTINGS = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "image_scale", "head_dim")
BRANCH_SETTINGS += ("attention",)
_REDUCED = re.compile(r"spatial-reduction:([1-9][0-9]{0,4})", re.ASCII)


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


def mlp_ratio(embed_dim: int, hidden_dim: int) -> float:
    """The ratio that makes so many hidden neurons: they are rounded down."""
    ratio = hidden_dim / embed_dim
    return ratio if int(embed_dim * ratio) == hidden_dim else math.nextafter(ratio, math.inf)


def sr_ratio_of(attention: object) -> int:
    """Rows and columns of patches that have one key together in an attention, see `Branch.attention`; 1 where each has
    its own."""
    match = _REDUCED.fullmatch(attention) if isinstance(attention, str) else None
    return int(match[1]) if match else 1


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch: a transformer over the patches of one size.

    As text, which `Branch.parse` reads: "embed_dim=192,depth=1:2:1,num_heads=3,mlp_ratio=4,patch_size=16,
    image_scale=14/15", where colons part the depths of the stages. Behind all, "head_dim=64" is of a branch without
    some of its heads of self-attention, and "attention=separable" of one with another self-attention.

    Raises ValueError for settings that make no branch, naming the value and what is accepted.
    """

    embed_dim: int
    depth: int | tuple[int, ...]  # transformer blocks per stage; a tuple has one number for each stage
    num_heads: int
    mlp_ratio: int | float = 4.0
    patch_size: int
    image_scale: int | float | Fraction = 1  # share of the image size that the branch sees; becomes a Fraction
    # Width of a head of self-attention, where the heads do not fill the width of the branch: those that are missing
    # were pruned. None: embed_dim / num_heads. Cross-attention has all heads.
    head_dim: int | None = None
    # Self-attention: of each token over all; "separable" (arXiv 2206.02680), which is linear in their number and has no
    # heads; or "spatial-reduction:2" (arXiv 2106.13797), where each square of 2 x 2 patches has one key.
    attention: str = "full"

    def __post_init__(self):
        for field in ("embed_dim", "num_heads", "patch_size"):
            require_whole(field, getattr(self, field), 1, LARGEST)
        for depth in self.depth if isinstance(self.depth, tuple) else (self.depth,):
            require_whole("depth", depth, 1, DEEPEST)
        self._check_heads()
        require_number("mlp_ratio", self.mlp_ratio, above=0, at_most=LARGEST)
        require_number("image_scale", self.image_scale, above=0, at_most=LARGEST)
        # timm writes a float (224/240), a fraction makes every size exact
        object.__setattr__(self, "image_scale", Fraction(self.image_scale).limit_denominator(1024))
        require_number("image_scale", self.image_scale, above=0, at_most=LARGEST)

    def _check_heads(self) -> None:
        if self.attention not in ("full", "separable") and self.sr_ratio < 2:
            raise ValueError(
                "attention must be full, separable or spatial-reduction:N, where N is the side in patches, from 2, of "
                f"the squares that have one key; got {shown_value(self.attention)}"
            )
        if self.head_dim is not None and self.attention != "full":
            raise ValueError(f"head_dim is for full attention alone; got {self.head_dim} with {self.attention}")
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise ValueError(f"embed_dim {self.embed_dim} cannot be cut into num_heads {self.num_heads}")
            return
        require_whole("head_dim", self.head_dim, 1, LARGEST)
        if self.embed_dim % self.head_dim or self.num_heads * self.head_dim > self.embed_dim:
            raise ValueError(
                f"embed_dim {self.embed_dim} cannot be cut into heads of head_dim {self.head_dim}, of which num_heads "
                f"{self.num_heads} are there"
            )
        if self.num_heads * self.head_dim == self.embed_dim:
            object.__setattr__(self, "head_dim", None)

    @property
    def head_width(self) -> int:
        """Channels of each head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def all_heads(self) -> int:
        """Heads that fill the width of the branch: those of cross-attention."""
        return self.embed_dim // self.head_width

    @property
    def sr_ratio(self) -> int:
        """See `sr_ratio_of`."""
        return sr_ratio_of(self.attention)

    @property
    def is_timms(self) -> bool:
        """Whether timm's CrossViT can have such a branch: with full attention, and all of its heads."""
        return self.head_dim is None and self.attention == "full"

    @property
    def hidden_dim(self) -> int:
        """Neurons between the two layers of an MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    def __str__(self):
        depth = ":".join(map(str, self.depth if isinstance(self.depth, tuple) else (self.depth,)))
        values = {name: getattr(self, name) for name in BRANCH_SETTINGS}
        values |= {"depth": depth, "mlp_ratio": repr(float(self.mlp_ratio)).removesuffix(".0")}
        return ",".join(f"{name}={value}" for name, value in values.items() if value not in (None, "full"))

    @classmethod
    def parse(cls, text: str) -> "Branch":
        """The branch that a text describes; `mlp_ratio` and what stands behind `patch_size` may be left
        out.

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


_READERS = {"depth": _depth, "mlp_ratio": float, "image_scale": read_fraction, "attention": str}
EXAMPLE = "embed_dim=96,depth=1,num_heads=3,mlp_ratio=4,patch_size=12,image_scale=1"
