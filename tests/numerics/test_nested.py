"""Nested widths: every model against a stock timm ViT with weights that NumPy cut out, counts against built modules."""

import numpy as np
import pytest
import torch
from numerics_cases import count, counted_flops, images, shake, stock_vit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp_dist.config.run_config import DataConfig
from lgp_dist.errors import UserError
from lgp_dist.models.descendant import descendant_from_path, load_descendant, timm_config
from lgp_dist.models.nested import NestedPool
from lgp_dist.paths.nested import NestedSpace
from lgp_dist.paths.path import Path
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import nested_base

DEPTH, HEADS = 3, (1, 2, 4)
SPACE = NestedSpace((8, 16, 32), DEPTH, 8, image_size=28, patch_size=7, channels=1, num_classes=10)


@pytest.fixture
def pool() -> NestedPool:
    """Three nested widths, no parameter at a special value."""
    torch.manual_seed(0)
    pool = NestedPool.empty(SPACE, SPACE.heads)
    shake(pool)
    return pool.eval()


def cut(pool: NestedPool, path: Path) -> VisionTransformer:
    """A stock ViT with the first channels, heads and hidden units of the whole one."""
    width = SPACE.widths[path.first_row]
    vit = stock_vit(width, DEPTH, HEADS[path.first_row])
    whole = {name: value.numpy() for name, value in pool.row_state(2).items()}
    for name, parameter in vit.named_parameters():
        value = whole[name]
        if "qkv" in name:  # [3, heads, channels of a head, ...]
            value = value.reshape(3, HEADS[-1], 8, *value.shape[1:])[:, : HEADS[path.first_row]]
            value = value.reshape(3 * width, *value.shape[3:])
        value = value[tuple(np.s_[:length] for length in parameter.shape)]
        parameter.data = torch.from_numpy(value.copy())
    return vit


@pytest.mark.parametrize("path", SPACE.paths, ids=lambda path: path.key)
def test_a_model_is_the_first_channels_of_the_whole(pool: NestedPool, path: Path) -> None:
    """Logits, tokens, and the gradient of every weight, which is zero outside of the model's slice."""
    stock, batch = cut(pool, path), images(4)
    logits, tokens = pool(batch, path, True)
    torch.testing.assert_close(logits, stock(batch))
    assert tokens.shape[-1] == SPACE.widths[path.first_row]
    logits.square().sum().backward()
    stock(batch).square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in stock.named_parameters()}
    whole = {name: parameter.grad for name, parameter in pool.named_parameters()}
    assert all(gradient is not None for gradient in whole.values())
    for name, gradient in whole.items():
        short = name.split(".unit.")[1].replace("rows.0.", "")
        block = name.split(".")[1].removeprefix("row0_block")
        short = f"blocks.{block}.{short.removeprefix('block.')}" if name.startswith("units.") else short
        total = theirs[short].square().sum()
        torch.testing.assert_close(gradient.square().sum(), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", SPACE.paths, ids=lambda path: path.key)
def test_cost_and_export(pool: NestedPool, path: Path) -> None:
    """A model's parameters and multiply-adds are those of the timm ViT that it is exported as, with equal logits."""
    model = descendant_from_path(pool, SPACE.heads, path)
    assert isinstance(model, VisionTransformer)
    cost = SPACE.cost(path)
    assert (cost.params, cost.flops) == (count(model), counted_flops(model, images(1)))
    config = timm_config(SPACE, SPACE.heads, path, DataConfig(image_size=28, channels=1, num_classes=10))
    again = load_descendant(config, model.state_dict())
    with torch.no_grad():
        batch = images(4)
        torch.testing.assert_close(again(batch), pool(batch, path), rtol=1e-5, atol=1e-6)


def test_checkpointing_changes_nothing(pool: NestedPool) -> None:
    """Activations that are computed again give the same gradients."""

    batch = images(4)

    def gradients() -> list[Tensor]:
        pool.zero_grad()
        pool(batch, SPACE.paths[1]).square().sum().backward()
        return [parameter.grad.clone() for parameter in pool.parameters()]

    kept = gradients()
    pool.set_grad_checkpointing()
    assert all(torch.equal(*pair) for pair in zip(kept, gradients(), strict=True))


def test_deit_sizes() -> None:
    """The narrower models of nested_base have the parameters of DeiT-Ti and DeiT-S, the whole one DeiT-Base's."""
    space = space_of(nested_base())
    params = {path.key: space.cost(path).params for path in space.paths}
    assert (params["w192"], params["w384"], params["w768"]) == (5_717_416, 22_050_664, 86_567_656)
    assert space.stored_params == params["w768"]


@pytest.mark.parametrize("widths", [(8, 12, 32), (16, 8, 32), (8, 8, 32)])
def test_widths_that_do_not_nest(widths: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="model.widths is .* multiples of the row's head width 8"):
        NestedSpace(widths, DEPTH, 8)
