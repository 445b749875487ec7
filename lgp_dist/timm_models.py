"""Makes stitched descendants known to timm. Import it before `timm.create_model("local-dir:FOLDER", pretrained=True)`.

Rows alone are timm's plain ViTs and do not need it.
"""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from lgp_dist.models.descendant import StitchedViT, model_of

__all__ = ["lgp_descendant"]


def _build(
    space: dict[str, Any],
    heads: list[int],
    path: str,
    num_classes: int,
    in_chans: int,
    img_size: int | tuple[int, int],
    global_pool: str = "token",
) -> StitchedViT:
    """A descendant with random weights. The input and pooling are fixed, the number of classes is free."""
    size = img_size if isinstance(img_size, int) else img_size[0]
    if (in_chans, size, global_pool) != (space["channels"], space["image_size"], "token"):
        raise ValueError(
            f"lgp_descendant takes {space['channels']} x {space['image_size']} x {space['image_size']} images and the "
            f"class token, not in_chans {in_chans}, img_size {img_size}, global_pool {global_pool!r}: leave these out."
        )
    return model_of({"space": space, "heads": heads, "path": path}, num_classes=num_classes)


@register_model
def lgp_descendant(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A stitched path, described by the config.json of its folder."""
    return build_model_with_cfg(_build, "lgp_descendant", pretrained, **kwargs)
