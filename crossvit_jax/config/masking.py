"""What is hidden of an image in pre-training: square cells of pixels, the same for every branch. No framework."""

import math

from crossvit_jax.config.crossvit import CrossViTConfig


def cell_grid(config: CrossViTConfig, cell: int) -> tuple[int, int]:
    """(rows, columns) of the cells of an image, each `cell` pixels wide and high.

    Raises ValueError if they do not fill the image, or are smaller than a branch's patches: nearly every patch would
    then be half masked.
    """
    height, width = config.image_size
    if cell < 1 or height % cell or width % cell:
        raise ValueError(f"cells of {cell} pixels do not fill an image of {height} x {width} pixels")
    for branch, (rows, columns) in enumerate(config.grid_size):
        stride = max(height / rows, width / columns)
        if cell < stride and not config.crop_scale:
            raise ValueError(
                f"cells of {cell} pixels are smaller than the patches of branch {branch}, which have {stride:g} pixels"
            )
    return height // cell, width // cell


def masked_cells(grid: tuple[int, int], ratio: float) -> int:
    """How many cells of a grid are masked: the share `ratio`, rounded up, as SimMIM does.

    Raises ValueError if these are none or all.
    """
    cells = math.prod(grid)
    masked = math.ceil(round(ratio * cells, 9))
    if not 0 < masked < cells:
        what = "all" if masked else "none"
        raise ValueError(f"a share of {ratio:g} masks {what} of the {cells} cells of an image: some must be left")
    return masked


def cell_overlaps(config: CrossViTConfig, branch: int, grid: tuple[int, int]) -> tuple[list[list[int]], ...]:
    """How long each patch of a branch and each cell share the same pixels: [patch][cell], along the rows and along the
    columns.

    The unit is such that all of them are whole numbers. The sum over the cells is the side of a patch.
    """
    overlaps = []
    for axis in (0, 1):
        patches, cells, side = config.grid_size[branch][axis], grid[axis], config.image_size[axis]
        seen = config.branch_image_size[branch][axis]
        if config.crop_scale and seen < side:  # see `scale_image`: the middle, in pixels of the image
            first, patch, cell = round((side - seen) / 2), seen // patches, side // cells
        else:
            first, patch, cell = 0, cells, patches
        starts, cell_starts = range(first, first + patch * patches, patch), range(0, cell * cells, cell)
        overlaps.append(
            [[max(0, min(start + patch, at + cell) - max(start, at)) for at in cell_starts] for start in starts]
        )
    return tuple(overlaps)
