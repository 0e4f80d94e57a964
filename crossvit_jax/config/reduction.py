"""How a model reduces its tokens, as a setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crossvit_jax.config.branch import Branch, shown_value

REDUCTIONS = ("merge", "fusion", "prune")


def for_each_branch(
    amounts: Sequence[int | float], branches: Sequence[Branch], nothing: int | float
) -> tuple[int | float, ...]:
    """Amounts as they are; a single one is for the widest branch, the last of several, and the others get `nothing`."""
    if len(amounts) != 1:
        return tuple(amounts)
    widest = max(range(len(branches)), key=lambda i: (branches[i].embed_dim, i))
    return tuple(amounts[0] if i == widest else nothing for i in range(len(branches)))


@dataclass(frozen=True)
class Reduction:
    """How a model reduces its patch tokens on the way, see `crossvit_jax.reduce`.

    As text, which `Reduction.parse` reads: "merge:8", "fusion:0.7" or "prune:0.7", where one number is for the branch
    with the largest `embed_dim`; or "fusion:0.7,0.5", a number for each branch.
    """

    kind: str  # of REDUCTIONS
    # of each branch: the patches that every block merges, 0 for none; or the share of them that is kept, 1 for all
    amounts: tuple[int | float, ...]

    @classmethod
    def parse(cls, text: object, branches: Sequence[Branch]) -> "Reduction":
        """The reduction that a text describes. Raises ValueError, naming what is wrong."""
        kind, _, numbers = text.partition(":") if isinstance(text, str) else ("", "", "")
        error = ValueError(
            "reduce_tokens must be merge:N (patches that each block merges), fusion:SHARE or prune:SHARE (that is "
            f"kept), with one number, for the widest branch, or one for each of the {len(branches)} branches; "
            f"got {shown_value(text)}"
        )
        if kind not in REDUCTIONS:
            raise error
        try:
            amounts = tuple((int if kind == "merge" else float)(number) for number in numbers.split(","))
        except ValueError:
            raise error from None
        nothing = cls(kind, ()).nothing
        amounts = for_each_branch(amounts, branches, nothing)
        fine = all(amount >= 0 if kind == "merge" else 0 < amount <= 1 for amount in amounts)  # not so for NaN
        if len(amounts) != len(branches) or not fine or set(amounts) == {nothing}:
            raise error
        return cls(kind, amounts)

    @property
    def nothing(self) -> int | float:
        """The amount that leaves a branch as it is."""
        return 0 if self.kind == "merge" else 1.0

    def left(self, branch: int, patches: int) -> int:
        """The patch tokens of a branch that are left of so many, after it was reduced once.

        Merging takes a patch of every pair at most. What is not kept becomes one more token; where that would be a
        single patch or none, nothing is reduced.
        """
        amount = self.amounts[branch]
        if self.kind == "merge":
            return patches - min(amount, patches // 2)
        kept = math.ceil(round(amount * patches, 6))  # 0.55 x 20 is no 11.000000000000002
        return min(kept + 1, patches)

    def blocks(self, branch: int, depth: int) -> list[bool]:
        """After the attention of which of a branch's blocks, over all stages, it is reduced.

        Merging: of each. Pruning: of those where a quarter, half and three quarters of the depth begin, EViT's 4th, 7th
        and 10th of 12. Fusion pruning: of none, it takes place between the stages.
        """
        places = {"merge": set(range(depth)), "prune": {depth * i // 4 for i in (1, 2, 3)}, "fusion": set()}[self.kind]
        return [self.amounts[branch] != self.nothing and i in places for i in range(depth)]
