"""Every start of the stitch layers against NumPy."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numerics_cases import HEADS, TWO, Array, array, capture, images, shake, stock_vit
from timm.layers import trunc_normal_
from torch import Tensor, nn

from lgp_dist.config.run_config import DistilConfig, PoolConfig, RowConfig, TrainConfig
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.errors import UserError
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryViT, build_rows
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.stitch import LeastSquares, StitchLayer
from lgp_dist.models.stitch_init import ancestry_means, least_squares_starts, nearest_level, transformation_starts
from lgp_dist.models.transformation import Level, levels_of
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import tiny
from lgp_dist.stages.pool import stitch_starts

NEAREST = {6: [0, 0, 1, 1, 2], 9: [0, 0, 0, 0, 1, 1, 1, 2]}
"""Level of each stitch layer: a layer of window (i, i + 1) lies at i + 0.5, levels at the last block of each third."""


def make(depth: int = 6, widths: tuple[int, ...] = (16, 32), levels: str = "dense", ancestry: int = 32, **distil: Any):
    """A path space and its rows with noise on every parameter, in eval mode."""
    space = PathSpace(widths, depth, image_size=28, patch_size=7, channels=1, num_classes=10)
    rows = tuple(RowConfig(width, 2, levels) for width in widths)
    built = build_rows(space, rows, DistilConfig(**distil), ancestry_depth=12, ancestry_width=ancestry)
    for row in built:
        shake(row.eval())
    return space, built


def stitched(start: tuple[Tensor, Tensor], tokens: Tensor) -> Array:
    """What a stitch layer that starts there gives."""
    layer = StitchLayer(start[0].shape[0], start[0].shape[1])
    layer.start_from(start)
    return array(layer(tokens))


@pytest.mark.parametrize("depth", NEAREST)
def test_nearest_levels(depth: int) -> None:
    """METHOD: the nearest distillation level; of two at the same distance the earlier one."""
    levels = levels_of("dense", 12, depth)
    assert [nearest_level(levels, window + 0.5) for window in range(depth - 1)] == NEAREST[depth]
    ends = [depth * third // 3 - 1 for third in (1, 2, 3)]
    for window, found in enumerate(NEAREST[depth]):
        assert abs(ends[found] - window - 0.5) == min(abs(end - window - 0.5) for end in ends)


@pytest.mark.parametrize("depth", NEAREST)
def test_transformation_applies_the_inverse_map(depth: int) -> None:
    """V in its own orientation: a stitch layer gives what the nearest level's V gives, bias included."""
    space, rows = make(depth)
    starts = transformation_starts("transformation", space, rows, {})
    assert list(starts) == list(range(depth - 1))
    tokens = torch.randn(2, 17, 16)
    for index, level in enumerate(NEAREST[depth]):
        inverse = rows[0].bank.inverse[level]
        expected = array(tokens) @ array(inverse.weight).T + array(inverse.bias)
        np.testing.assert_allclose(stitched(starts[index], tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_low_rank_update_leaves_the_weight_and_starts_at_nothing() -> None:
    """tokens times (W + B A / r): the plain layer before training; AdamW with decay then moves A, B and bias alone."""
    layer = StitchLayer(16, 32, rank=4)
    layer.start_from((torch.randn(16, 32), torch.randn(32)))
    tokens, start = torch.randn(2, 5, 16), array(layer.weight)
    np.testing.assert_allclose(array(layer(tokens)), array(tokens) @ start.T + array(layer.bias), rtol=1e-4, atol=1e-5)
    pool = LearngenePool.empty(PathSpace((16, 32), 3, two_way=True), (2, 2), stitch_rank=4)
    fixed = pool.fixed_weights
    assert fixed == {f"units.stitch{index}.layer.weight" for index in range(4)}
    pool.units["stitch1"].layer = layer
    optimizer = build_optimizer(pool, TrainConfig(lr=0.01))
    for _ in range(3):
        layer(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert np.array_equal(array(layer.weight), start) and layer.up.abs().max() > 0
    whole = start + array(layer.up) @ array(layer.down) / 4
    np.testing.assert_allclose(array(layer(tokens)), array(tokens) @ whole.T + array(layer.bias), rtol=1e-4, atol=1e-5)
    merged = StitchLayer(16, 32)
    merged.load_state_dict(layer.merged(), strict=True)
    assert torch.equal(merged(tokens), layer(tokens))
    assert LearngenePool.empty(TWO, HEADS[TWO]).fixed_weights == frozenset()


def test_transformation_paper_is_the_mean_of_w_transposed() -> None:
    """tokens times mean(W) transposed, the same for every stitch layer, and no bias."""
    space, rows = make()
    starts = transformation_starts("transformation_paper", space, rows, {})
    matrices = [array(linear.weight).T for linear in rows[0].bank.block]
    assert all(matrix.shape == (32, 16) for matrix in matrices)
    tokens = torch.randn(2, 17, 16)
    for start in starts.values():
        np.testing.assert_allclose(
            stitched(start, tokens), array(tokens) @ np.mean(matrices, 0).T, rtol=1e-4, atol=1e-5
        )
        assert np.array_equal(array(start[1]), np.zeros(32))
    assert len(starts) == 5


@pytest.mark.parametrize("depth", NEAREST)
def test_transformation_pinv(depth: int) -> None:
    """W+ and mu - (b + mu W) W+ of the nearest level, with that level's own mean."""
    space, rows = make(depth)
    means = {block: torch.randn(32) for block in (3, 7, 11)}
    starts = transformation_starts("transformation_pinv", space, rows, means)
    for index, level in enumerate(NEAREST[depth]):
        linear, mean = rows[0].bank.block[level], array(means[(3, 7, 11)[level]])
        matrix, bias = array(linear.weight).T, array(linear.bias)
        inverse = np.linalg.pinv(matrix)
        np.testing.assert_allclose(array(starts[index][0]), inverse, rtol=1e-4, atol=1e-6)
        expected = mean - (bias + mean @ matrix) @ inverse
        np.testing.assert_allclose(array(starts[index][1]), expected, rtol=1e-4, atol=1e-5)


def test_pinv_undoes_w() -> None:
    """With W of full rank, encoding a stitched token gives the narrow token back, and the mean goes to the mean."""
    space, rows = make()
    means = {block: torch.randn(32) for block in (3, 7, 11)}
    starts = transformation_starts("transformation_pinv", space, rows, means)
    tokens = torch.randn(5, 16)
    for index, level in enumerate(NEAREST[6]):
        linear, mean = rows[0].bank.block[level], array(means[(3, 7, 11)[level]])
        matrix, bias = array(linear.weight).T, array(linear.bias)
        assert np.linalg.matrix_rank(matrix) == 16
        np.testing.assert_allclose(stitched(starts[index], tokens) @ matrix + bias, array(tokens), atol=2e-4)
        encoded = torch.from_numpy(mean @ matrix + bias).float()
        np.testing.assert_allclose(stitched(starts[index], encoded), mean, atol=2e-4)


def test_ancestry_means_are_means_over_all_tokens() -> None:
    """Mean token after each level's block, over batches of different size."""
    vit, batches = stock_vit(32, 12, 4), [images(5), images(2)]
    found = ancestry_means(Ancestry(vit), levels_of("dense", 12, 6), batches)
    seen = [capture(vit, batch).blocks for batch in batches]
    assert found.keys() == {3, 7, 11}
    for block, mean in found.items():
        tokens = np.concatenate([blocks[block].reshape(-1, 32) for blocks in seen])
        np.testing.assert_allclose(array(mean), tokens.mean(0), rtol=1e-4, atol=1e-5)


def solve(source: Array, target: Array, ridge: float) -> tuple[Array, Array]:
    """Least squares with a free bias by numpy.linalg.lstsq; the ridge as extra rows that ask for a matrix of zeros."""
    width = source.shape[1]
    penalty = np.sqrt(ridge * np.mean(np.sum(source**2, axis=0)))
    left = np.block([[source, np.ones((len(source), 1))], [penalty * np.eye(width), np.zeros((width, 1))]])
    right = np.concatenate([target, np.zeros((width, target.shape[1]))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution[:-1], solution[-1]


def expected_least_squares(space: PathSpace, rows: list[AuxiliaryViT], batches: list[Tensor], ridge: float):
    """Mean over the pairs (j, k) of each layer, from what hooks on stock models saw."""
    seen = []
    for row, width in zip(rows, space.widths, strict=True):
        vit = stock_vit(width, space.depth, 2)
        vit.load_state_dict(row.vit.state_dict(), strict=True)
        seen.append([capture(vit, batch) for batch in batches])
    solved: dict[int, list[tuple[Array, Array]]] = {}
    for pair, narrow in enumerate(space.widths[:-1]):
        for j in range(space.depth):
            for k in range(max(j - 1, 0), min(j + 2, space.depth)):
                window = min(j, k) if j != k else max(j - 1, 0)
                source = np.concatenate([one.blocks[j].reshape(-1, narrow) for one in seen[pair]])
                wide = space.widths[pair + 1]
                target = np.concatenate([one.inputs[k].reshape(-1, wide) for one in seen[pair + 1]])
                solved.setdefault(pair * (space.depth - 1) + window, []).append(solve(source, target, ridge))
    return {index: tuple(np.mean(part, 0) for part in zip(*found, strict=True)) for index, found in solved.items()}


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize(("depth", "widths"), [(4, (16, 32)), (3, (16, 32, 48))])
def test_least_squares(depth: int, widths: tuple[int, ...], ridge: float) -> None:
    """Ridge least squares from block j's output to what block k is fed, averaged over the pairs of a layer."""
    space, rows = make(depth, widths)
    batches = [images(6), images(3)]
    found = least_squares_starts(space, rows, iter(batches), ridge)
    expected = expected_least_squares(space, rows, batches, ridge)
    assert found.keys() == expected.keys() == set(range((depth - 1) * (len(widths) - 1)))
    for index, (matrix, bias) in expected.items():
        np.testing.assert_allclose(array(found[index][0]), matrix, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(found[index][1]), bias, rtol=1e-4, atol=1e-5)


def test_least_squares_finds_an_exact_map() -> None:
    """Targets that are an affine map of the sources, given in several batches, give that map back."""
    matrix, bias = torch.randn(5, 7), torch.randn(7)
    problem = LeastSquares(5, 7)
    for _ in range(3):
        source = torch.randn(4, 6, 5)
        problem.add(source, source @ matrix + bias)
    found = problem.solve(0.0)
    torch.testing.assert_close(found[0], matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], bias, rtol=1e-4, atol=1e-5)


def test_start_reaches_the_pool() -> None:
    """A pool whose stitch layer took a start maps tokens by `tokens @ matrix + bias` on the paths that cross there."""
    space, rows = make(4)
    pool = LearngenePool(space, [row.vit for row in rows]).eval()
    matrix, bias = torch.randn(16, 32), torch.randn(32)
    pool.stitch(1).start_from((matrix, bias))
    tokens = torch.randn(2, 17, 16)
    for path in space.paths:
        out = pool.units["stitch1"](tokens, path)
        if path.stitches == (1,):
            np.testing.assert_allclose(array(out), array(tokens) @ array(matrix) + array(bias), rtol=1e-4, atol=1e-4)
        else:
            assert out is tokens


def test_random_is_timms_default() -> None:
    """The recipe's `random` gives no start, and a stitch layer alone has timm's initial weights: std 0.02, bias 0."""
    config = dataclasses.replace(tiny(), pool=PoolConfig(stitch_init="random"))
    assert stitch_starts(SimpleNamespace(config=config), None, []) == {}
    torch.manual_seed(3)
    layer = StitchLayer(16, 32)
    torch.manual_seed(3)
    linear = nn.Linear(16, 32)
    trunc_normal_(linear.weight, std=0.02)
    assert torch.equal(layer.weight, linear.weight) and (layer.bias == 0).all()


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("transformation", {"inverse_weight": 0.0}),
        ("transformation", {"levels": "none"}),
        ("transformation_paper", {"levels": "none"}),
        ("transformation_pinv", {"levels": "none"}),
        ("transformation", {"ancestry": 48}),
        ("transformation_paper", {"ancestry": 48}),
        ("transformation_pinv", {"ancestry": 16}),
        ("transformation", {"widths": (16, 32, 48), "ancestry": 48}),
    ],
)
def test_unavailable_transformation_is_a_sentence(init: Any, options: dict[str, Any]) -> None:
    """Where no map between the two widths was learned, the error names init, widths and what to choose."""
    space, rows = make(**options)
    with pytest.raises(UserError) as caught:
        transformation_starts(init, space, rows, {block: torch.zeros(32) for block in range(12)})
    text = str(caught.value)
    assert text.startswith(f"pool.stitch_init {init} needs a transformation between widths 16 and 32")
    assert "--pool.stitch-init least_squares" in text and text.endswith(".")


def test_inverse_off_leaves_the_papers_starts() -> None:
    """inverse_weight 0 learns no V; the paper's start, which needs W alone, is still there."""
    space, rows = make(inverse_weight=0.0)
    assert len(transformation_starts("transformation_paper", space, rows, {})) == 5


def test_single_level_serves_every_layer() -> None:
    """With the last block alone distilled, all stitch layers start from its V."""
    space, rows = make(levels="last")
    assert rows[0].levels == (Level(11, 5),)
    starts = transformation_starts("transformation", space, rows, {})
    assert len(starts) == 5
    assert all(torch.equal(start[0], rows[0].bank.inverse[0].weight.T) for start in starts.values())
