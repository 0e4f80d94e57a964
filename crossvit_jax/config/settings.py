"""What the settings of all models have in common."""

from typing import Any


class Settings:
    """A frozen dataclass whose `__post_init__` brings what it is given into its usual form."""

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)
