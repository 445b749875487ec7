"""Initial weights of a pool's stitch layers, from the transformations of distillation or the rows' own features."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lgp_dist.config.run_config import StitchInit
from lgp_dist.errors import UserError
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryViT
from lgp_dist.models.stitch import Affine, LeastSquares, from_pinv, from_transpose, mean_affine
from lgp_dist.models.transformation import Level
from lgp_dist.models.vit import embed, forward_with_taps
from lgp_dist.paths.stitched import PathSpace

Starts = dict[int, Affine]
"""Matrix and bias by index of the stitch layer."""


def nearest_level(levels: tuple[Level, ...], block: float) -> int:
    """Index of the level whose auxiliary block is nearest; ties go to the earlier one."""
    return min(range(len(levels)), key=lambda index: (abs(levels[index].auxiliary - block), index))


def transformation_starts(
    init: StitchInit, space: PathSpace, rows: list[AuxiliaryViT], means: dict[int, Tensor]
) -> Starts:
    """Initial weights from W or V of the narrow row (docs/method.md, "Stitch layers start from").

    means: the ancestry's mean token [D] by block, for `transformation_pinv`.
    UserError where the narrow row learned no transformation to the wide row's width.
    """
    starts: Starts = {}
    for path in space.paths:
        if path.is_row or path.stitches[0] in starts:
            continue
        # The first path of a window leaves the narrow row after the window's first block.
        index, pair, block = path.stitches[0], path.first_row, path.segments[0].stop - 1
        narrow, wide = space.stitch_widths[index]
        row = rows[pair]
        maps: list[nn.Module] = list(row.bank.inverse if init == "transformation" else row.bank.block)
        if not maps or not isinstance(maps[0], nn.Linear) or wide not in maps[0].weight.shape:
            raise UserError(
                f"pool.stitch_init {init} needs a transformation between widths {narrow} and {wide}, but row {pair} "
                "learned none (its levels, distil.inverse_weight, or another width of the ancestry): choose "
                "--pool.stitch-init least_squares."
            )
        level = nearest_level(row.levels, block + 0.5)
        if init == "transformation_paper":
            starts[index] = from_transpose(maps)
        elif init == "transformation_pinv":
            starts[index] = from_pinv(maps[level], means[row.levels[level].ancestry])
        else:
            starts[index] = (maps[level].weight.T, maps[level].bias)
    return starts


@torch.no_grad()
def ancestry_means(ancestry: Ancestry, levels: Iterable[Level], images: Iterable[Tensor]) -> dict[int, Tensor]:
    """The ancestry's mean token [D] after each level's block, over all images [B, C, H, W]."""
    blocks = {level.ancestry for level in levels}
    sums = {block: torch.zeros(ancestry.vit.embed_dim, dtype=torch.float64) for block in blocks}
    tokens = 0
    for batch in images:
        _, outputs, _ = ancestry(batch, blocks)
        for block, output in outputs.items():
            sums[block] += output.double().sum((0, 1)).cpu()
        tokens += batch.shape[0] * next(iter(outputs.values())).shape[1] if outputs else 0
    return {block: (total / tokens).float() for block, total in sums.items()}


@torch.no_grad()
def least_squares_starts(space: PathSpace, rows: list[AuxiliaryViT], images: Iterable[Tensor], ridge: float) -> Starts:
    """Ridge regression for every path of one stitch, from the output of the block before to the input of that after.

    Solutions of pairs that share a layer are averaged, since no single one is exact for all of them. Rows must be in
    eval mode. images: [B, C, H, W] each.
    """
    problems = {
        path: LeastSquares(*space.stitch_widths[path.stitches[0]]) for path in space.paths if len(path.stitches) == 1
    }
    for batch in images:
        outputs = [forward_with_taps(row.vit, batch, range(len(row.vit.blocks)))[1] for row in rows]
        inputs = [{0: embed(row.vit, batch), **_shifted(found)} for row, found in zip(rows, outputs, strict=True)]
        for path, problem in problems.items():
            low, high = path.segments
            problem.add(outputs[low.row][low.stop - 1].cpu(), inputs[high.row][high.start].cpu())
    shared: dict[int, list[Affine]] = {}
    for path, problem in problems.items():
        shared.setdefault(path.stitches[0], []).append(problem.solve(ridge))
    return {index: mean_affine(parts) for index, parts in shared.items()}


def _shifted(outputs: dict[int, Tensor]) -> dict[int, Tensor]:
    """The inputs of all blocks but the first: the output of the block before."""
    return {block + 1: output for block, output in outputs.items()}
