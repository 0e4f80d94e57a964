"""Which patch sizes a classifier is compared at."""

from crossvit_jax import CrossViTConfig

# those of about the published ratio of both grids, 20 to 14, at 240 and 224 pixels
_PAIRS = ((24, 32), (20, 28), (12, 16), (10, 14), (8, 14))


def compared_patch_sizes(
    config: CrossViTConfig, trained: tuple[tuple[int, ...], ...] | None = None
) -> list[tuple[int, ...]]:
    """A model's own patch size and those that it was trained with, as far as they divide the branches' images.

    Where no others were trained: twice and half its own, and for two branches the usual pairs. Those with the fewest
    patches come first.
    """
    stored = config.patch_size
    wanted = {stored, *(trained or ())}
    if trained is None:
        wanted |= {tuple(2 * size for size in stored), *(_PAIRS if len(stored) == 2 else ())}
        if not any(size % 2 for size in stored):
            wanted.add(tuple(size // 2 for size in stored))
    fitting = []
    for sizes in wanted:
        try:
            fitting.append(config.at_patch_size(sizes))
        except ValueError:  # three convolutions fit no other size
            continue
    patches = {c.patch_size: sum(rows * columns for rows, columns in c.grid_size) for c in fitting}
    return sorted(patches, key=lambda sizes: (patches[sizes], sizes))
