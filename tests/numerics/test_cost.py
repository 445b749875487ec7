"""The arithmetic of parameters and FLOPs against built modules, timm's models and torch's own counter."""

import pytest
import timm
import torch
from numerics_cases import EVERY_PATH, HEADS, SPACES, count, counted_flops, images, path_id, stock_rows

from lgp_dist.models.descendant import descendant_from_path, empty_descendant
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.path import Path
from lgp_dist.paths.stitched import PathSpace

EMBEDDINGS = ("cls_token", "pos_embed")
DEIT = PathSpace((192, 384, 768), 12)
POOL12 = PathSpace((192, 768), 6)


@pytest.mark.parametrize(("space", "path"), EVERY_PATH, ids=path_id)
def test_cost_of_a_path_is_that_of_its_descendant(space: PathSpace, path: Path) -> None:
    """Parameters, the paper's parameters and FLOPs equal the built model's exactly."""
    pool = LearngenePool(space, stock_rows(space))
    model, cost = descendant_from_path(pool, HEADS[space], path), space.cost(path)
    assert cost.params == count(model)
    assert cost.params_paper == count(model, without=() if path.is_row else EMBEDDINGS)
    assert cost.flops == counted_flops(model, images(1))


@pytest.mark.parametrize("space", SPACES, ids=path_id)
def test_stored_parameters_are_those_of_the_pool_module(space: PathSpace) -> None:
    """What the pool is said to store is what its module holds; no tensor is counted or kept twice."""
    pool = LearngenePool(space, stock_rows(space))
    assert space.stored_params == count(pool) == sum(value.numel() for value in pool.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("path", POOL12.paths, ids=path_id)
def test_cost_of_the_papers_pool_on_the_meta_device(path: Path) -> None:
    """pool(12) at full size, built without memory: parameters and FLOPs of every path."""
    with torch.device("meta"):
        model = empty_descendant(POOL12, (3, 12), path)
        batch = torch.empty(1, 3, 224, 224)
    cost = POOL12.cost(path)
    assert cost.params == count(model)
    assert cost.flops == counted_flops(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "name"), enumerate(["deit_tiny", "deit_small", "deit_base"]))
@pytest.mark.parametrize("depth", [6, 9, 12])
def test_rows_weigh_and_compute_what_timms_deit_does(row: int, name: str, depth: int) -> None:
    """Single rows against timm's DeiT-Ti, S and B with 6, 9 and 12 blocks."""
    with torch.device("meta"):
        model = timm.create_model(f"{name}_patch16_224", depth=depth)
        batch = torch.empty(1, 3, 224, 224)
    space = PathSpace(DEIT.widths, depth)
    cost = space.cost(space.paths[row])
    assert cost.params == cost.params_paper == count(model)
    assert cost.flops == counted_flops(model, batch)
