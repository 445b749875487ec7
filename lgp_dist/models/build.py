"""The models of a recipe. Stages and benchmarks build theirs here, so that a benchmark times what a stage trains."""

from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import Precision, RunConfig
from lgp_dist.models.ancestry import Ancestry, Needs, timm_model
from lgp_dist.models.ancestry_adapter import ImageAdapter, TokenAdapter, has_token_blocks
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.models.nested import NestedPool
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.pretrained import ancestry_images
from lgp_dist.models.sws import auxiliary_net, expand
from lgp_dist.models.vit import build_vit
from lgp_dist.paths.depths import DepthSpace
from lgp_dist.paths.nested import NestedSpace
from lgp_dist.paths.space import heads_of, rows_space, space_of

Taught = Literal["distil", "finetune"]
"""A stage in which the ancestry is the teacher."""
State = dict[str, Tensor]
"""Tensors by name."""


def model_input(config: RunConfig) -> dict[str, int]:
    """Image size, patch size, channels and number of classes, which all models of a run share."""
    data = config.data
    return {
        "image_size": data.image_size,
        "patch_size": config.model.patch_size,
        "channels": data.channels,
        "num_classes": data.num_classes,
    }


def ancestry_vit(config: RunConfig) -> nn.Module:
    """The ancestry's architecture with random weights.

    UserError where timm has no such model, or what is needed of it is not there.
    """
    ancestry, shared = config.ancestry, model_input(config)
    shared |= {"image_size": ancestry.image_size or shared["image_size"]}
    if ancestry.head == "none":
        shared["num_classes"] = 0
    if ancestry.model == "vit":
        shape = {"width": ancestry.width, "depth": ancestry.depth, "heads": ancestry.heads}
        return build_vit(drop_path=ancestry.drop_path, **shape, **shared)
    needs: Needs = "tokens" if config.taps_ancestry else "logits"
    if config.copies_ancestry or ancestry.source == "train":
        needs = "plain"
    return timm_model(ancestry.model, "ancestry", needs, **shared)


def ancestry_of(config: RunConfig, vit: nn.Module) -> Ancestry:
    """The frozen teacher that an architecture makes in a run, with adapters for the run's images and rows."""
    ancestry, data = config.ancestry, config.data
    expected = ancestry_images(config)
    images = ImageAdapter(expected["image_size"], (data.mean, data.std), (expected["mean"], expected["std"]))
    tokens = TokenAdapter(vit, data.image_size // config.model.patch_size) if has_token_blocks(vit) else None
    return Ancestry(
        vit,
        None if images.is_identity(data.image_size) else images,
        None if tokens is None or tokens.is_identity else tokens,
        classifies=ancestry.head != "none",
    )


def build_ancestry(config: RunConfig, device: torch.device, state: State | None = None) -> Ancestry:
    """The frozen teacher on a device, as timm builds it. state: its weights; random ones if None."""
    vit = ancestry_vit(config)
    if state is not None:
        vit.load_state_dict(state, strict=True)
    return ancestry_of(config, vit).to(device)


def ancestry_precision(config: RunConfig, stage: Taught) -> Precision:
    """The precision of the ancestry's forwards in a stage."""
    return config.engine.ancestry(getattr(config, stage).ancestry_precision)


def prepare_ancestry(ancestry: Ancestry, config: RunConfig, stage: Taught) -> Ancestry:
    """Casts and compiles the ancestry, in place, as the stage runs it; returns it."""
    return ancestry.prepare(ancestry_precision(config, stage), config.engine.compile)


def auxiliary_rows(config: RunConfig, ancestry: Ancestry | None) -> AuxiliaryRows:
    """All rows of stage distil with random weights. ancestry: needed if `config.has_levels`."""
    space = rows_space(config)
    if isinstance(space, DepthSpace):
        return auxiliary_net(space, config.model.rows[0], config.distil)
    shape = (ancestry.depth, ancestry.vit.embed_dim) if ancestry and config.has_levels else ()
    return AuxiliaryRows(build_rows(space, config.model.rows, config.distil, *shape))


def pool_of_rows(config: RunConfig, rows: list[VisionTransformer]) -> LearngenePool:
    """The pool of the rows that stage distil made, or the models of several depths or widths that grow from the one."""
    space = space_of(config)
    if isinstance(space, DepthSpace):
        return expand(space, rows[0], heads_of(config))
    if isinstance(space, NestedSpace):
        return NestedPool(space, rows[0])
    return LearngenePool(space, rows, config.model.stitch_rank)


def build_pool(
    config: RunConfig, device: torch.device, state: State | None = None, *, training: bool = False
) -> LearngenePool:
    """The pool on a device. state: its weights; random ones if None.

    training: in training mode, with the operations of `engine.ops`; otherwise in eval mode, as timm computes. The
    engine compiles its blocks and makes them recompute activations when it wraps the pool (`engine.trainer`).
    """
    space = space_of(config)
    if isinstance(space, NestedSpace):
        pool: LearngenePool = NestedPool.empty(space, heads_of(config))
    else:
        pool = LearngenePool.empty(space, heads_of(config), config.model.stitch_rank)
    if state is not None:
        pool.load_state_dict(state, strict=True)
    pool.to(device).train(training)
    if training:
        pool.set_ops(config.engine.ops)
    return pool
