"""Initial weights of rows: pretrained anchors, the ancestry's last blocks, or a selection of its weights."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp_dist.errors import UserError

TAIL = 3
"""Blocks of the ancestry that vanilla learngene keeps."""


def check_row(vit: VisionTransformer, stock: VisionTransformer, name: str, key: str) -> None:
    """UserError where timm's model differs from a row in width, heads or blocks.

    Weights would load in spite of other heads. vit: the row. name: timm's for `stock`. key: the row's, for messages.
    """
    ours, theirs = _shape(vit), _shape(stock)
    if ours != theirs:
        raise UserError(
            f"{key}.model {name} has width {theirs[0]}, {theirs[1]} heads and {theirs[2]} blocks, but the row has "
            f"{ours[0]}, {ours[1]} and {ours[2]}: set these to match, or choose another model."
        )


def take_tail(vit: VisionTransformer, ancestry: VisionTransformer, key: str) -> None:
    """Copies the ancestry's last blocks, final norm and head into a row; its other tensors stay as they are.

    UserError where width or heads differ, or the row or the ancestry has too few blocks. key: of the row's settings.
    """
    ours, theirs = _shape(vit), _shape(ancestry)
    if ours[:2] != theirs[:2] or min(ours[2], theirs[2]) < TAIL:
        raise UserError(
            f"{key}.source is tail, but the row has width {ours[0]}, {ours[1]} heads and {ours[2]} blocks and the "
            f"ancestry {theirs[0]}, {theirs[1]} and {theirs[2]}: give the row the ancestry's width and heads, and both "
            f"{TAIL} blocks or more."
        )
    for mine, source in zip(vit.blocks[-TAIL:], ancestry.blocks[-TAIL:], strict=True):
        mine.load_state_dict(source.state_dict(), strict=True)
    vit.norm.load_state_dict(ancestry.norm.state_dict(), strict=True)
    vit.head.load_state_dict(ancestry.head.state_dict(), strict=True)


def select_weights(vit: VisionTransformer, ancestry: VisionTransformer, key: str) -> None:
    """Gives a row the ancestry's weights: evenly spaced blocks and, where the row is narrower, evenly spaced channels.

    Uniform weight selection (arXiv 2311.18823): a row of width d takes the same d of D channels everywhere, and of each
    block's query, key, value and hidden units the same fraction. With the ancestry's width it takes whole blocks.
    UserError where the row is wider, or has more blocks. key: of the row's settings.
    """
    ours, theirs = _shape(vit), _shape(ancestry)
    if ours[0] > theirs[0] or ours[2] > theirs[2] or (ours[0] == theirs[0] and ours[1] != theirs[1]):
        raise UserError(
            f"{key}.start is ancestry, but the row has width {ours[0]}, {ours[1]} heads and {ours[2]} blocks and the "
            f"ancestry {theirs[0]}, {theirs[1]} and {theirs[2]}: make the row no larger, with the same heads where the "
            "widths are equal, or set start to random."
        )
    source, chosen = ancestry.state_dict(), {}
    for name, tensor in vit.state_dict().items():
        theirs_name = name
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            block = round((int(index) + 1) * theirs[2] / ours[2]) - 1  # the row's last block is the ancestry's last
            theirs_name = f"blocks.{block}.{rest}"
        # Query, key and value lie one after the other in one tensor: each gives its own channels.
        parts = 3 if ".attn.qkv." in name else 1
        pairs = zip(tensor.chunk(parts), source[theirs_name].chunk(parts), strict=True)
        chosen[name] = torch.cat([_evenly_spaced(theirs_part, mine.shape) for mine, theirs_part in pairs])
    vit.load_state_dict(chosen, strict=True)


def _evenly_spaced(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Evenly spaced entries of a tensor along each dimension, in this shape."""
    for dim, (wanted, size) in enumerate(zip(shape, tensor.shape, strict=True)):
        if wanted != size:
            tensor = tensor.index_select(dim, torch.linspace(0, size - 1, wanted).round().long())
    return tensor


def _shape(vit: VisionTransformer) -> tuple[int, int, int]:
    """Width, heads and blocks."""
    return vit.embed_dim, vit.blocks[0].attn.num_heads, len(vit.blocks)
