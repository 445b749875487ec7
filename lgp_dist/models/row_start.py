"""What rows that are not distilled begin with: pretrained anchors, or the ancestry's last blocks."""

from timm.models.vision_transformer import VisionTransformer

from lgp_dist.errors import UserError

TAIL = 3
"""Blocks of the ancestry that vanilla learngene keeps."""


def check_row(vit: VisionTransformer, stock: VisionTransformer, name: str, key: str) -> None:
    """UserError where timm's model is no row of this shape; its weights would load with other heads, unseen.

    vit: the row. name: timm's, of `stock`. key: of the row's settings.
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


def _shape(vit: VisionTransformer) -> tuple[int, int, int]:
    """Width, heads and blocks."""
    return vit.embed_dim, vit.blocks[0].attn.num_heads, len(vit.blocks)
