"""One path as a standalone model that owns its weights."""

import copy
import dataclasses
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp_dist.config import DataConfig
from lgp_dist.models.pool import LearngenePool, row_vit
from lgp_dist.models.stitch import StitchLayer
from lgp_dist.models.vit import classify, embed, split_vit
from lgp_dist.paths import Path, PathSpace
from lgp_dist.spaces import AnyPath, Space, space_from


class Descendant(nn.Module):
    """A stitched path: stem and first blocks of one row, a stitch layer, blocks and head of the next."""

    def __init__(self, space: PathSpace, heads: tuple[int, ...], path: Path):
        """A descendant with random weights; heads: attention heads of each row."""
        super().__init__()
        low, high = path.segments
        self.stem, low_blocks, _ = split_vit(row_vit(space, low.row, heads))
        _, high_blocks, self.head = split_vit(row_vit(space, high.row, heads))
        self.low = nn.Sequential(*low_blocks[low.start : low.stop])
        self.stitch = StitchLayer(space.widths[low.row], space.widths[high.row])
        self.high = nn.Sequential(*high_blocks[high.start : high.stop])
        self.has_norm = space.has_norm(path)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images to [B, classes] logits."""
        tokens = self.low(embed(self.stem, images))
        return classify(self.head, self.high(self.stitch(tokens)), self.has_norm)


def empty_descendant(space: Space, heads: tuple[int, ...], path: AnyPath) -> VisionTransformer | Descendant:
    """A model of the path's shape: a stock timm ViT for a row alone, a `Descendant` for a stitched path."""
    if path.stitch is None:
        return row_vit(space, path.first_row, heads)
    return Descendant(space, heads, path)


@torch.no_grad()
def descendant_from_path(pool: LearngenePool, heads: tuple[int, ...], path: AnyPath) -> VisionTransformer | Descendant:
    """The path's model with copies of the pool's weights, in eval mode; its logits equal the path's bit for bit."""
    model = empty_descendant(pool.space, heads, path)
    model.load_state_dict(copy.deepcopy(descendant_state(pool, path)), strict=True)
    return model.eval()


def descendant_state(pool: LearngenePool, path: AnyPath) -> dict[str, Tensor]:
    """The path's weights under the names of its standalone model."""
    if path.stitch is None:
        return pool.row_state(path.first_row)
    low, high = path.segments
    parts: dict[str, nn.Module] = {"stem": pool.stem.rows[low.row], "head": pool.head.rows[high.row]}
    for name, segment in (("low", low), ("high", high)):
        for index in range(segment.start, segment.stop):
            parts[f"{name}.{index - segment.start}"] = pool.units[f"row{segment.row}_block{index}"].block
    parts["stitch"] = pool.stitch(path.stitch)
    return {f"{prefix}.{name}": value for prefix, part in parts.items() for name, value in part.state_dict().items()}


def timm_config(space: Space, heads: tuple[int, ...], path: AnyPath, data: DataConfig) -> dict[str, Any]:
    """config.json of an exported descendant, in timm's local-dir layout.

    A row alone is a plain ViT: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it. `lgp` holds what
    `load_descendant` needs for every path.
    """
    row, pooling = path.first_row, "token" if space.class_token else "avg"
    return {
        "architecture": "vit_tiny_patch16_224" if path.stitch is None else "lgp_descendant",
        "num_classes": space.num_classes,
        "num_features": space.widths[path.last_row],
        "global_pool": pooling,
        "model_args": {
            "img_size": space.image_size,
            "patch_size": space.patch_size,
            "in_chans": space.channels,
            "embed_dim": space.widths[row],
            "depth": space.depths[row],
            "num_heads": heads[row],
            "class_token": space.class_token,
            "global_pool": pooling,
        },
        "pretrained_cfg": {
            "input_size": [space.channels, space.image_size, space.image_size],
            "fixed_input_size": True,
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
            "crop_mode": "center",
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": space.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "lgp": {"path": path.key, "space": dataclasses.asdict(space), "heads": list(heads)},
    }


def load_descendant(config: dict[str, Any], state: dict[str, Tensor]) -> VisionTransformer | Descendant:
    """The exported model of a config.json and the tensors of its model.safetensors, in eval mode."""
    about = config["lgp"]
    space = space_from(about["space"])
    model = empty_descendant(space, tuple(about["heads"]), space.by_key(about["path"]))
    model.load_state_dict(state, strict=True)
    return model.eval()
