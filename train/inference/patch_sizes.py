"""Which patch sizes a classifier is compared at."""

from crossvit_jax import CrossViTConfig

# those of about the published ratio of both grids, 20 to 14, at 240 and 224 pixels
_PAIRS = ((24, 32), (20, 28), (12, 16), (10, 14), (8, 14))


def usual_patch_sizes(config: CrossViTConfig) -> list[tuple[int, ...]]:
    """The patch sizes of a model, twice and half of them, and for two branches the usual pairs, as far as they divide
    the branches' images; those with the fewest patches first."""
    stored = config.patch_size
    wanted = {stored, tuple(2 * size for size in stored), *(_PAIRS if len(stored) == 2 else ())}
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
