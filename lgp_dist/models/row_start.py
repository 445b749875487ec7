"""Initial weights of rows: pretrained anchors, the ancestry's last blocks, or a selection of its weights."""

import re
from collections.abc import Mapping
from math import isqrt

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp_dist.errors import UserError

LAYER_SCALE = re.compile(r"\.ls([12])\.gamma$")
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


def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain ViT's weights as a row has them, of the same function: without layer scale, and with a class position.

    Layer scale multiplies the outputs of a linear layer, so it is folded into that layer's weights. Where a model adds
    no position to its class token, as DeiT-3, that position is zero.
    """
    plain = dict(state)
    for name, factor in state.items():
        if match := LAYER_SCALE.search(name):
            layer = name[: match.start()] + (".attn.proj" if match[1] == "1" else ".mlp.fc2")
            parts = [part for part in (f"{layer}.weight", f"{layer}.bias") if part in state]
            if any(state[part].shape[:1] != factor.shape for part in parts):
                continue  # it stays, and is refused as a tensor that a row does not have
            del plain[name]
            for part in parts:
                scale = factor.double().view(-1, *[1] * (state[part].ndim - 1))
                plain[part] = (state[part].double() * scale).float()
    positions = plain.get("pos_embed")
    if positions is not None and positions.ndim == 3 and isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        plain["pos_embed"] = F.pad(positions, (0, 0, 1, 0))
    return plain


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
    source = plain_weights(ancestry.state_dict())
    for number, mine in enumerate(vit.blocks[-TAIL:], theirs[2] - TAIL):
        prefix = f"blocks.{number}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
        mine.load_state_dict(parts, strict=True)
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
    source, chosen = plain_weights(ancestry.state_dict()), {}
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
