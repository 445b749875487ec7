"""How well stitch layers map tokens from row to row: R^2 on images that their initialisation has not seen."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.vit import embed


@torch.no_grad()
def stitch_fits(pool: LearngenePool, images: Iterable[Tensor]) -> dict[str, float]:
    """R^2 of every path of one stitch by its key: the layer's output against the next row's own input to that block.

    R^2 = 1 - squared error / squared distance of the next row's tokens from their mean token, over all images and
    tokens: 1 is perfect, 0 no better than a constant. pool: in eval mode, with the operations of `reference`. images:
    [B, C, H, W].
    """
    stitched = [path for path in pool.space.paths if len(path.stitches) == 1]
    if not stitched:
        return {}
    errors = {path.key: 0.0 for path in stitched}
    sums: dict[tuple[int, int], Tensor] = {}
    squares: dict[tuple[int, int], float] = {}
    count = 0
    for batch in images:
        rows = [_entries(pool, row, batch) for row in range(len(pool.space.widths))]
        count += rows[0][0].shape[0] * rows[0][0].shape[1]
        for path in stitched:
            low, high = path.segments
            mapped = pool.stitch(path.stitches[0])(rows[low.row][low.stop])
            error = mapped.double() - rows[high.row][high.start].double()
            errors[path.key] += float(error.square().sum())
        for row, block in {(path.segments[1].row, path.segments[1].start) for path in stitched}:
            target = rows[row][block].double()
            sums[row, block] = sums.get((row, block), 0.0) + target.sum((0, 1))
            squares[row, block] = squares.get((row, block), 0.0) + float(target.square().sum())
    found = {}
    for path in stitched:
        target = (path.segments[1].row, path.segments[1].start)
        found[path.key] = 1 - errors[path.key] / (squares[target] - float(sums[target].square().sum()) / count)
    return found


def _entries(pool: LearngenePool, row: int, images: Tensor) -> list[Tensor]:
    """The inputs of each block of a row alone and, last, the output of its last block: [B, N, D] each."""
    tokens = [embed(pool.stem.rows[row], images)]
    for index in range(pool.space.depths[row]):
        tokens.append(pool.units[f"row{row}_block{index}"].block(tokens[-1]))
    return tokens
