"""Fewer patch tokens: merging of similar ones, and one token in place of those that are attended to least.

A token that stands for several patches counts as often: its size is their number, and attention adds log(size) to its
scores (ToMe, arXiv 2210.09461 section 3, "proportional attention"). The class token stays as it is, at index 0, and its
size is 1. All shapes are static. Tokens are moved by products with matrices of zeros and ones: their gradient is a
product too, and no sort, gather or scatter is needed.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crossvit_jax.config import Reduction

Size = Float[Tensor, "batch _"]  # of tokens
_SMALLEST_NORM = 1e-12  # torch's normalize has the same


def log_size(size: Size | None) -> Float[Tensor, "batch tokens"] | None:
    """What attention adds to the scores of each key; None, before anything was reduced, for nothing."""
    return None if size is None else size.log()


def mean_patch(x: Float[Tensor, "batch tokens dim"], size: Size | None) -> Float[Tensor, "batch dim"]:
    """The mean of the patches, behind the class token; each token counts for those that it stands for."""
    if size is None:
        return x[:, 1:].mean(1)
    size = size[:, 1:].to(x.dtype)
    return _product((size / size.sum(1, keepdim=True))[:, None], x[:, 1:])[:, 0]


def merge_tokens(
    x: Float[Tensor, "batch tokens dim"],
    size: Size | None,
    keys: Float[Tensor, "batch tokens heads width"],
    count: int,
) -> tuple[Float[Tensor, "batch fewer dim"], Float[Tensor, "batch fewer"]]:
    """Token merging (ToMe, arXiv 2210.09461 section 3.1): bipartite soft matching of the patches.

    The tokens are dealt alternately to two sets A and B, the class token first. Every patch of A is matched with the
    most similar one of B, by the cosine of the mean over the heads of their keys. The `count` most similar of these
    pairs become one token each, the mean of all patches that they stand for. Of equals, the first is taken.

    Args:
        size: of the tokens; None: all 1.
        keys: of the attention that x comes from.
        count: pairs to merge, at most half of the patches; all where there are fewer.

    Returns:
        `count` tokens less, and their sizes: the class token, the unmerged patches of A, then B.
    """
    size = _sizes(x, size)
    metric = keys[:, 1:].detach().to(size.dtype).mean(2)
    metric = metric / metric.square().sum(-1, keepdim=True).sqrt().clamp(min=_SMALLEST_NORM)
    a, b = slice(2, None, 2), slice(1, None, 2)  # of all tokens; the class token is the first of A
    scores = _product(metric[:, 1::2], metric[:, 0::2].transpose(1, 2))
    best, partner = scores.amax(-1), scores.argmax(-1)
    count = min(count, best.shape[1])
    rank = _rank(best)
    stays = rank >= count  # in its place among those: the next merging deals them by their order
    rank = torch.where(stays, count - 1 + stays.cumsum(1), rank)
    order = _one_hot(rank, best.shape[1]).transpose(1, 2).to(size.dtype)  # rows: pairs to merge, then the others
    pairs = _product(order, x[:, a])
    pair_sizes = _product(order, size[:, a, None])[..., 0]
    into = _product(order[:, :count], _one_hot(partner, scores.shape[2]).to(size.dtype)).transpose(1, 2)
    into = into * pair_sizes[:, None, :count]
    b_sizes = size[:, b] + into.sum(-1)
    merged = _product(into / b_sizes[..., None], pairs[:, :count])
    merged = merged + (size[:, b] / b_sizes)[..., None].to(x.dtype) * x[:, b]
    tokens = torch.cat([x[:, :1], pairs[:, count:], merged], dim=1)
    return tokens, torch.cat([size[:, :1], pair_sizes[:, count:], b_sizes], dim=1)


def keep_attended(
    x: Float[Tensor, "batch tokens dim"], size: Size | None, attention: Float[Tensor, "batch tokens"], left: int
) -> tuple[Float[Tensor, "batch fewer dim"], Float[Tensor, "batch fewer"]]:
    """The patches that are attended to most, and one token in place of the others: their mean, weighted by attention
    (EViT, arXiv 2202.07800 section 3.2).

    Args:
        size: of the tokens; None: all 1.
        attention: to each token, in any scale; that to the class token does not count. Of equals, the first is kept.
        left: patch tokens that are left over, the mean of the others among them.

    Returns:
        The class token, the patches kept with the most attended to first, then the mean; and their sizes.
    """
    size = _sizes(x, size)
    attention = attention[:, 1:].to(size.dtype)
    place = _one_hot(_rank(attention).clamp(max=left - 1), left).transpose(1, 2).to(size.dtype)
    rest = place[:, -1] * attention.clamp(min=_SMALLEST_NORM)  # which may have been rounded to 0 for all of them
    mean = torch.cat([place[:, :-1], (rest / rest.sum(-1, keepdim=True))[:, None]], dim=1)
    tokens = torch.cat([x[:, :1], _product(mean, x[:, 1:])], dim=1)
    return tokens, torch.cat([size[:, :1], _product(place, size[:, 1:, None])[..., 0]], dim=1)


def prune(
    reduction: Reduction,
    branch: int,
    x: Float[Tensor, "batch tokens dim"],
    size: Size | None,
    class_attention: Float[Tensor, "batch heads tokens"],
) -> tuple[Float[Tensor, "batch fewer dim"], Float[Tensor, "batch fewer"] | None]:
    """Those of a branch's tokens that a class token attends to most in the mean of the heads, see `keep_attended`."""
    patches = x.shape[1] - 1
    left = reduction.left(branch, patches)
    return (x, size) if left == patches else keep_attended(x, size, class_attention.mean(1), left)


def _sizes(x: Tensor, size: Size | None) -> Size:
    """The sizes in float32 or wider."""
    real = torch.promote_types(x.dtype, torch.float32)
    return torch.ones_like(x[..., 0], dtype=real) if size is None else size.to(real)


def _rank(scores: Float[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
    """How many come before each, the largest first and of equals the first: counted, which takes less than to sort."""
    ours, others = scores[:, :, None], scores[:, None]
    place = torch.arange(scores.shape[1], device=scores.device)
    before = (others > ours) | ((others == ours) & (place < place[:, None]))
    return before.sum(-1)


def _one_hot(places: Int[Tensor, "batch n"], count: int) -> Tensor:
    return places[..., None] == torch.arange(count, device=places.device)


def _product(a: Float[Tensor, "batch n k"], b: Float[Tensor, "batch k m"]) -> Float[Tensor, "batch n m"]:
    """a @ b in b's dtype, under autocast too."""
    with torch.autocast(b.device.type, enabled=False):
        return a.to(b.dtype) @ b
