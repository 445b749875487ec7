"""One path as a standalone model that owns its weights."""

import copy
import dataclasses
from typing import Any

import torch
from timm.models import PretrainedCfg
from timm.models._manipulate import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import DataConfig
from lgp_dist.models.pool import BlockUnit, LearngenePool, row_vit
from lgp_dist.models.stitch import StitchLayer
from lgp_dist.models.vit import classify, embed, split_vit
from lgp_dist.paths.path import Path, Space
from lgp_dist.paths.space import space_from
from lgp_dist.paths.stitched import PathSpace

PARTS = (("low", "stitch"), ("high", "stitch_back"), ("back", ""))
"""Names of a stitched model's segments and of the stitch layer after each. A third is back in the first one's row."""


class StitchedViT(nn.Module):
    """A stitched path: stem and first blocks of one row, a stitch layer, blocks of another; perhaps back; its head."""

    def __init__(self, space: PathSpace, heads: tuple[int, ...], path: Path):
        """With random weights. heads: attention heads of each row."""
        super().__init__()
        self.order: tuple[str, ...] = ()
        for (name, stitch), part, index in zip(PARTS, path.segments, (*path.stitches, None), strict=False):
            stem, blocks, self.head = split_vit(row_vit(space, part.row, heads))
            if not self.order:
                self.stem = stem
            setattr(self, name, nn.Sequential(*blocks[part.start : part.stop]))
            self.order += (name,)
            if index is not None:
                setattr(self, stitch, StitchLayer(*space.stitch_widths[index]))
                self.order += (stitch,)
        self.has_norm = space.has_norm(path)
        self.num_classes, self.num_features = space.num_classes, space.widths[path.last_row]
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks recompute their activations in backward, under timm's name."""
        self.grad_checkpointing = enable

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images to [B, N, D] tokens after the final norm, if there is one; under timm's name."""
        tokens = self._tokens(images)
        return self.head.norm(tokens) if self.has_norm else tokens

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images to [B, classes] logits."""
        return classify(self.head, self._tokens(images), self.has_norm)

    @property
    def segments(self) -> tuple[nn.Sequential, ...]:
        """The blocks of each segment, in the order in which they run."""
        return tuple(getattr(self, name) for name in self.order[::2])

    def _tokens(self, images: Tensor) -> Tensor:
        again, tokens = self.grad_checkpointing and torch.is_grad_enabled(), embed(self.stem, images)
        for name in self.order:
            part = getattr(self, name)
            tokens = checkpoint_seq(part, tokens) if again and isinstance(part, nn.Sequential) else part(tokens)
        return tokens


def empty_descendant(space: Space, heads: tuple[int, ...], path: Path) -> VisionTransformer | StitchedViT:
    """A model of the path's shape: a stock timm ViT for a row alone, a `StitchedViT` for a stitched path."""
    if path.is_row:
        return row_vit(space, path.first_row, heads)
    return StitchedViT(space, heads, path)


@torch.no_grad()
def descendant_from_path(pool: LearngenePool, heads: tuple[int, ...], path: Path) -> VisionTransformer | StitchedViT:
    """The path's model with copies of the pool's weights, in eval mode; its logits equal the path's bit for bit."""
    model = empty_descendant(pool.space, heads, path)
    model.load_state_dict(copy.deepcopy(descendant_state(pool, path)), strict=True)
    return model.eval()


def descendant_state(pool: LearngenePool, path: Path) -> dict[str, Tensor]:
    """The path's weights under the names of its standalone model."""
    if path.is_row:
        return pool.row_state(path.first_row)
    parts = {
        "stem": pool.stem.rows[path.first_row].state_dict(),
        "head": pool.head.rows[path.last_row].state_dict(),
    }
    for (name, stitch), part, layer in zip(PARTS, path.segments, (*path.stitches, None), strict=False):
        for index in range(part.start, part.stop):
            parts[f"{name}.{index - part.start}"] = pool.units[f"row{part.row}_block{index}"].block.state_dict()
        if layer is not None:
            parts[stitch] = pool.stitch(layer).merged()
    return {f"{prefix}.{name}": value for prefix, part in parts.items() for name, value in part.items()}


def pool_state(pool: LearngenePool) -> dict[str, Tensor]:
    """All weights of a pool, each once, under the names of `export/modeling_descendant.PlainPool`."""
    ends = (("stems", pool.stem), ("heads", pool.head))
    parts = {f"{name}.{row}": part.state_dict() for name, unit in ends for row, part in enumerate(unit.rows)}
    for unit in pool.units.values():
        if isinstance(unit, BlockUnit):
            parts[f"blocks.{unit.row}.{unit.index}"] = unit.block.state_dict()
        else:
            parts[f"stitches.{unit.index}"] = unit.layer.merged()
    return {f"{prefix}.{name}": value for prefix, part in parts.items() for name, value in part.items()}


def shape_of(model: VisionTransformer | StitchedViT) -> dict[str, Any]:
    """What `export/modeling_descendant.py` needs to build the model again, read from the model itself."""
    stitched = isinstance(model, StitchedViT)
    stem, head = (model.stem, model.head) if stitched else (model, model)
    rows = model.segments if stitched else (model.blocks,)
    return {
        "segments": [
            {"width": row[0].norm1.weight.numel(), "heads": row[0].attn.num_heads, "depth": len(row)} for row in rows
        ],
        "image_size": stem.patch_embed.img_size[0],
        "patch_size": stem.patch_embed.patch_size[0],
        "channels": stem.patch_embed.proj.in_channels,
        "num_classes": head.head.out_features,
        "class_token": stem.cls_token is not None,
        "pool": head.global_pool,
        "norms": [name for name in ("norm", "fc_norm") if not isinstance(getattr(head, name), nn.Identity)],
        "final_norm": not stitched or model.has_norm,
    }


def vit_arguments(model: VisionTransformer) -> dict[str, Any]:
    """Arguments with which timm builds the model again."""
    shape = shape_of(model)
    (row,) = shape["segments"]
    same = {
        "img_size": shape["image_size"],
        "patch_size": shape["patch_size"],
        "in_chans": shape["channels"],
        "embed_dim": row["width"],
        "depth": row["depth"],
        "num_heads": row["heads"],
    }
    return same if shape["class_token"] else {**same, "class_token": False, "global_pool": shape["pool"]}


def exported_config(
    model: VisionTransformer | StitchedViT,
    data: DataConfig,
    arguments: dict[str, Any],
    about: dict[str, Any],
    classes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """config.json of an exported model, in timm's local-dir layout with a full pretrained_cfg.

    arguments: those with which timm's plain ViT or `lgp_descendant` builds it again. about: what is stored under `lgp`.
    classes: names of the labels, if they are known.
    """
    shape, plain = shape_of(model), isinstance(model, VisionTransformer)
    size = (shape["channels"], shape["image_size"], shape["image_size"])
    architecture = "vit_tiny_patch16_224" if plain else "lgp_descendant"
    pretrained = PretrainedCfg(
        architecture=architecture,
        input_size=size,
        test_input_size=size,
        min_input_size=size,
        fixed_input_size=True,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        test_crop_pct=data.crop_pct,
        crop_mode="center",
        mean=tuple(data.mean),
        std=tuple(data.std),
        num_classes=shape["num_classes"],
        first_conv="patch_embed.proj" if plain else "stem.patch_embed.proj",
        classifier="head" if plain else "head.head",
    )
    return {
        "architecture": architecture,
        "num_classes": shape["num_classes"],
        "num_features": shape["segments"][-1]["width"],
        "global_pool": shape["pool"],
        "model_args": arguments,
        "pretrained_cfg": pretrained.to_dict(remove_source=True),
        **({"label_names": list(classes)} if classes else {}),
        "lgp": {**about, "shape": shape},
    }


def timm_config(
    space: Space, heads: tuple[int, ...], path: Path, data: DataConfig, classes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """config.json of an exported path.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it; a stitched path needs
    `import lgp_dist.timm_models` first.
    """
    with torch.device("meta"):
        model = empty_descendant(space, heads, path)
    about = {"path": path.key, "space": dataclasses.asdict(space), "heads": list(heads)}
    arguments = vit_arguments(model) if path.is_row else about
    return exported_config(model, data, arguments, about, classes)


def load_descendant(config: dict[str, Any], state: dict[str, Tensor]) -> VisionTransformer | StitchedViT:
    """The exported model of a config.json and the tensors of its model.safetensors, in eval mode."""
    model = model_of(config["lgp"])
    model.load_state_dict(state, strict=True)
    return model.eval()


def model_of(about: dict[str, Any], **changed: int) -> VisionTransformer | StitchedViT:
    """A model with random weights of the path, space and heads that config.json names under `lgp`.

    changed: fields of the space that differ, such as num_classes."""
    space = space_from({**about["space"], **changed})
    return empty_descendant(space, tuple(about["heads"]), space.by_key(about["path"]))
