"""The models of a recipe. Stages and benchmarks build theirs here, so that a benchmark times what a stage trains."""

from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import Precision, RunConfig
from lgp_dist.models.ancestry import Ancestry, timm_model
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.models.nested import NestedPool
from lgp_dist.models.pool import LearngenePool
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

    It is a plain ViT where its blocks are used or the run trains it; UserError where timm has no such ViT.
    """
    ancestry = config.ancestry
    if ancestry.model == "vit":
        shape = {"width": ancestry.width, "depth": ancestry.depth, "heads": ancestry.heads}
        return build_vit(drop_path=ancestry.drop_path, **shape, **model_input(config))
    plain = config.taps_ancestry or ancestry.source == "train"
    return timm_model(ancestry.model, "ancestry", plain, **model_input(config))


def build_ancestry(config: RunConfig, device: torch.device, state: State | None = None) -> Ancestry:
    """The frozen teacher on a device, as timm builds it. state: its weights; random ones if None."""
    vit = ancestry_vit(config)
    if state is not None:
        vit.load_state_dict(state, strict=True)
    return Ancestry(vit).to(device)


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
    return NestedPool(space, rows[0]) if isinstance(space, NestedSpace) else LearngenePool(space, rows)


def build_pool(
    config: RunConfig, device: torch.device, state: State | None = None, *, training: bool = False
) -> LearngenePool:
    """The pool on a device. state: its weights; random ones if None.

    training: in training mode, with the operations of `engine.ops`; otherwise in eval mode, as timm computes. The
    engine compiles its blocks and makes them recompute activations when it wraps the pool (`engine.trainer`).
    """
    space = space_of(config)
    kind = NestedPool if isinstance(space, NestedSpace) else LearngenePool
    pool = kind.empty(space, heads_of(config))
    if state is not None:
        pool.load_state_dict(state, strict=True)
    pool.to(device).train(training)
    if training:
        pool.set_ops(config.engine.ops)
    return pool
