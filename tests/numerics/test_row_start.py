"""Rows that start from the ancestry's weights, against indexing in NumPy."""

import numpy as np
import pytest
import torch
from numerics_cases import array, images, stock_vit

from lgp_dist.errors import UserError
from lgp_dist.models.row_start import select_weights


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


@pytest.mark.parametrize("shape", [(48, 6, 4), (32, 13, 4), (32, 6, 2)])
def test_a_row_that_the_ancestry_cannot_fill_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="model.rows.1.start is ancestry, but the row has width"):
        select_weights(stock_vit(*shape), stock_vit(32, 12, 4), "model.rows.1")
