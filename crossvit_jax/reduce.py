"""Fewer patch tokens: merging of similar ones, and one token in place of those that are attended to least.

A token that stands for several patches counts as often: its size is their number, and attention adds log(size) to its
scores (ToMe, arXiv 2210.09461 section 3, "proportional attention"). The class token stays as it is, at index 0, and its
size is 1. All shapes are static. Tokens are moved by products with matrices of zeros and ones: their gradient is a
product too, and no sort, gather or scatter is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crossvit_jax.config import Reduction

Size = Float[Array, "batch _"]  # of tokens
_SMALLEST_NORM = 1e-12  # torch's normalize has the same


def log_size(size: Size | None) -> Float[Array, "batch tokens"] | None:
    """What attention adds to the scores of each key; None, before anything was reduced, for nothing."""
    return None if size is None else jnp.log(size)


def mean_patch(x: Float[Array, "batch tokens dim"], size: Size | None) -> Float[Array, "batch dim"]:
    """The mean of the patches, behind the class token; each token counts for those that it stands for."""
    if size is None:
        return x[:, 1:].mean(1)
    size = size[:, 1:].astype(x.dtype)
    return _product((size / size.sum(1, keepdims=True))[:, None], x[:, 1:])[:, 0]


def merge_tokens(
    x: Float[Array, "batch tokens dim"],
    size: Size | None,
    keys: Float[Array, "batch tokens heads width"],
    count: int,
) -> tuple[Float[Array, "batch fewer dim"], Float[Array, "batch fewer"]]:
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
    metric = jax.lax.stop_gradient(keys[:, 1:]).astype(size.dtype).mean(2)
    metric /= jnp.maximum(jnp.sqrt(jnp.square(metric).sum(-1, keepdims=True)), _SMALLEST_NORM)
    a, b = slice(2, None, 2), slice(1, None, 2)  # of all tokens; the class token is the first of A
    scores = _product(metric[:, 1::2], metric[:, 0::2].swapaxes(1, 2))
    best, partner = scores.max(-1), scores.argmax(-1)
    count = min(count, best.shape[1])
    rank = _rank(best)
    stays = rank >= count  # in its place among those: the next merging deals them by their order
    rank = jnp.where(stays, count - 1 + jnp.cumsum(stays, axis=1), rank)
    order = _one_hot(rank, best.shape[1]).swapaxes(1, 2).astype(size.dtype)  # rows: pairs to merge, then the others
    pairs = _product(order, x[:, a])
    pair_sizes = _product(order, size[:, a, None])[..., 0]
    into = _product(order[:, :count], _one_hot(partner, scores.shape[2]).astype(size.dtype)).swapaxes(1, 2)
    into *= pair_sizes[:, None, :count]
    b_sizes = size[:, b] + into.sum(-1)
    merged = _product(into / b_sizes[..., None], pairs[:, :count])
    merged += (size[:, b] / b_sizes)[..., None].astype(x.dtype) * x[:, b]
    tokens = jnp.concatenate([x[:, :1], pairs[:, count:], merged], axis=1)
    return tokens, jnp.concatenate([size[:, :1], pair_sizes[:, count:], b_sizes], axis=1)


def keep_attended(
    x: Float[Array, "batch tokens dim"], size: Size | None, attention: Float[Array, "batch tokens"], left: int
) -> tuple[Float[Array, "batch fewer dim"], Float[Array, "batch fewer"]]:
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
    attention = attention[:, 1:].astype(size.dtype)
    place = _one_hot(jnp.minimum(_rank(attention), left - 1), left).swapaxes(1, 2).astype(size.dtype)
    rest = place[:, -1] * jnp.maximum(attention, _SMALLEST_NORM)  # which may have been rounded to 0 for all of them
    mean = jnp.concatenate([place[:, :-1], (rest / rest.sum(-1, keepdims=True))[:, None]], axis=1)
    tokens = jnp.concatenate([x[:, :1], _product(mean, x[:, 1:])], axis=1)
    return tokens, jnp.concatenate([size[:, :1], _product(place, size[:, 1:, None])[..., 0]], axis=1)


def prune(
    reduction: Reduction,
    branch: int,
    x: Float[Array, "batch tokens dim"],
    size: Size | None,
    class_attention: Float[Array, "batch heads tokens"],
) -> tuple[Float[Array, "batch fewer dim"], Float[Array, "batch fewer"] | None]:
    """Those of a branch's tokens that a class token attends to most in the mean of the heads, see `keep_attended`."""
    patches = x.shape[1] - 1
    left = reduction.left(branch, patches)
    return (x, size) if left == patches else keep_attended(x, size, class_attention.mean(1), left)


def _sizes(x: Array, size: Size | None) -> Size:
    """The sizes in float32 or wider."""
    real = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.ones_like(x[..., 0], real) if size is None else size.astype(real)


def _rank(scores: Float[Array, "batch n"]) -> Int[Array, "batch n"]:
    """How many come before each, the largest first and of equals the first: counted, which takes less than to sort."""
    ours, others = scores[:, :, None], scores[:, None]
    place = jnp.arange(scores.shape[1])
    before = (others > ours) | ((others == ours) & (place[None, None] < place[None, :, None]))
    return before.sum(-1)


def _one_hot(places: Int[Array, "batch n"], count: int) -> Array:
    return places[..., None] == jnp.arange(count)[None, None]


def _product(a: Float[Array, "batch n k"], b: Float[Array, "batch k m"]) -> Float[Array, "batch n m"]:
    """a @ b in b's dtype. Zeros and ones move what they multiply bit for bit, on accelerators too."""
    return jnp.matmul(a.astype(b.dtype), b, precision=jax.lax.Precision.HIGHEST)
