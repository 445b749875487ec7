"""Rows that start from the ancestry's weights, against indexing in NumPy."""

import numpy as np
import pytest
import torch
from numerics_cases import array, images, stock_vit
from timm.models.vision_transformer import VisionTransformer

from lgp_dist.errors import UserError
from lgp_dist.models.row_start import plain_weights, select_weights, take_tail


def test_a_row_of_the_ancestrys_width_takes_every_second_block() -> None:
    """Six of twelve blocks, the last one among them; embeddings, norm and head are the ancestry's."""
    row, ancestry = stock_vit(32, 6, 4), stock_vit(32, 12, 4)
    select_weights(row, ancestry, "model.rows.1")
    for index, block in enumerate(row.blocks):
        for name, value in block.state_dict().items():
            assert torch.equal(value, ancestry.blocks[2 * index + 1].state_dict()[name])
    assert torch.equal(row.pos_embed, ancestry.pos_embed) and torch.equal(row.head.weight, ancestry.head.weight)
    batch = images(2)
    tokens = ancestry.norm_pre(ancestry.patch_drop(ancestry._pos_embed(ancestry.patch_embed(batch))))
    for block in ancestry.blocks[1::2]:
        tokens = block(tokens)
    assert torch.allclose(row(batch), ancestry.forward_head(ancestry.norm(tokens)), atol=1e-6)


def test_a_narrower_row_takes_evenly_spaced_channels() -> None:
    """The same channels of the residual stream everywhere; of query, key and value each its own third."""
    row, ancestry = stock_vit(16, 6, 2), stock_vit(32, 12, 4)
    select_weights(row, ancestry, "model.rows.0")
    channels, hidden = np.linspace(0, 31, 16).round().astype(int), np.linspace(0, 127, 64).round().astype(int)
    block, source = row.blocks[2], ancestry.blocks[5]
    qkv = array(source.attn.qkv.weight).reshape(3, 32, 32)[:, channels][:, :, channels].reshape(48, 16)
    assert np.array_equal(array(block.attn.qkv.weight), qkv)
    assert np.array_equal(array(block.attn.qkv.bias), array(source.attn.qkv.bias).reshape(3, 32)[:, channels].ravel())
    assert np.array_equal(array(block.mlp.fc1.weight), array(source.mlp.fc1.weight)[np.ix_(hidden, channels)])
    assert np.array_equal(array(block.mlp.fc2.weight), array(source.mlp.fc2.weight)[np.ix_(channels, hidden)])
    assert np.array_equal(array(row.pos_embed), array(ancestry.pos_embed)[..., channels])
    assert np.array_equal(array(row.head.weight), array(ancestry.head.weight)[:, channels])


def deit3(width: int, depth: int, heads: int) -> VisionTransformer:
    """A ViT as DeiT-3 has it, with layer scale and no position of the class token; no parameter at a special value."""
    return stock_vit(width, depth, heads, init_values=0.5, no_embed_class=True)


def test_layer_scale_and_a_missing_position_become_plain_weights() -> None:
    """timm's model and a plain ViT with its weights are one function; the plain ViT's own weights stay as they are."""
    scaled, plain, batch = deit3(32, 3, 4), stock_vit(32, 3, 4), images(3)
    assert not torch.allclose(plain(batch), scaled(batch), atol=1e-2)
    own = plain_weights(plain.state_dict())
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    plain.load_state_dict(plain_weights(scaled.state_dict()), strict=True)
    assert torch.allclose(plain(batch), scaled(batch), atol=1e-5)


def test_rows_start_from_an_ancestry_with_layer_scale() -> None:
    """As from a plain ViT of the same function: all of its blocks, or its last three."""
    ancestry, batch = deit3(32, 6, 4), images(2)
    row = stock_vit(32, 6, 4)
    select_weights(row, ancestry, "model.rows.1")
    assert torch.allclose(row(batch), ancestry(batch), atol=1e-5)
    tail = stock_vit(32, 3, 4)
    take_tail(tail, ancestry, "model.rows.1")
    tokens = torch.randn(2, 17, 32)
    for mine, theirs in zip(tail.blocks, ancestry.blocks[3:], strict=True):
        assert torch.allclose(mine(tokens), theirs(tokens), atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 6, 4), (32, 13, 4), (32, 6, 2)])
def test_a_row_that_the_ancestry_cannot_fill_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="model.rows.1.start is ancestry, but the row has width"):
        select_weights(stock_vit(*shape), stock_vit(32, 12, 4), "model.rows.1")
