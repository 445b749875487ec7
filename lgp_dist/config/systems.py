"""What a recipe becomes as another system: SN-Net, SN-Net v2, SWS, vanilla learngene, nested widths, from scratch, or a
pool whose rows start from the ancestry."""

from dataclasses import replace
from typing import Any

from lgp_dist.config.budget import Amount, Budget
from lgp_dist.config.run_config import (
    FinetuneConfig,
    GradientConfig,
    ModelConfig,
    PoolConfig,
    RowConfig,
    RunConfig,
    TrainConfig,
)


def with_rows(model: ModelConfig, **changes: Any) -> ModelConfig:
    """The model with the same changes of all its rows."""
    return replace(model, rows=tuple(replace(row, **changes) for row in model.rows))


def from_ancestry(base: RunConfig, recipe: str, distil: float, finetune: float) -> RunConfig:
    """The pool of two rows of another recipe, trained as question pools of `lgp study` found best (docs/results.md).

    Rows start from the ancestry; stitches start by least squares; fine-tuning has both rows in every step, twice
    distillation's learning rate, and a tenth of that for the wide row. distil, finetune: epochs of the stages.
    """
    train = replace(base.finetune.train, epochs=finetune, lr=2 * base.distil.train.lr, accumulate=4)
    return replace(
        base,
        recipe=recipe,
        model=with_rows(base.model, start="ancestry"),
        distil=replace(base.distil, train=replace(base.distil.train, epochs=distil)),
        pool=PoolConfig(stitch_init="least_squares"),
        finetune=FinetuneConfig(sandwich=True, row_lr=(1.0, 0.1), train=train),
    )


def one_path_a_step(base: RunConfig) -> RunConfig:
    """The configuration with one path per rank and step in fine-tuning, at half of distillation's learning rate."""
    train = replace(base.distil.train, lr=base.distil.train.lr / 2)
    return replace(base, finetune=FinetuneConfig(train=train))


def undistilled(base: RunConfig, recipe: str) -> RunConfig:
    """SN-Net on the rows of another recipe, each trained with labels only; all else is unchanged."""
    return replace(
        base,
        recipe=recipe,
        model=with_rows(base.model, source="labels", levels="none"),
        pool=replace(base.pool, stitch_init="least_squares"),
    )


def both_ways(base: RunConfig, recipe: str, rank: int, bin_flops: float) -> RunConfig:
    """SN-Net v2: another recipe's rows, stitched in both directions by low-rank updates, drawn by bins of FLOPs."""
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, two_way=True, stitch_rank=rank),
        pool=replace(base.pool, stitch_init="least_squares"),
        finetune=replace(base.finetune, bin_flops=Amount(bin_flops), distil_weight=0.0, label_weight=1.0),
    )


def tail_alone(base: RunConfig, recipe: str) -> RunConfig:
    """Vanilla learngene: only the wide row of another recipe, random blocks followed by the ancestry's last three.

    It is trained for as long, with labels only.
    """
    row = replace(base.model.rows[-1], source="tail", levels="none")
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, rows=(row,)),
        finetune=replace(base.finetune, distil_weight=0.0),
        budget=Budget(),
    )


def from_scratch(base: RunConfig, recipe: str, key: str, train: TrainConfig) -> RunConfig:
    """One path of another recipe's pool, trained from random weights with labels only."""
    return replace(
        base,
        recipe=recipe,
        model=with_rows(base.model, source="random", levels="none"),
        pool=replace(base.pool, stitch_init="random"),
        finetune=replace(base.finetune, distil_weight=0.0, only=(key,), train=train),
        evaluate=replace(base.evaluate, before=False),
        budget=Budget(),
    )


def nested(base: RunConfig, recipe: str, row: RowConfig, widths: tuple[int, ...], train: TrainConfig) -> RunConfig:
    """Models of several widths nested in one ViT, on the data and with the ancestry of another recipe.

    Stage finetune trains them from random weights, all on the same images: the ancestry teaches the whole ViT, and each
    model the next narrower.
    """
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, rows=(row,), widths=widths),
        finetune=FinetuneConfig(
            policy="in_turn", paths_per_batch=len(widths), lead_weight=1.0, train=replace(train, accumulate=len(widths))
        ),
        evaluate=replace(base.evaluate, before=False),
    )


def each_alone(depths: int, train: TrainConfig) -> FinetuneConfig:
    """Fine-tuning in which each of `depths` models takes every batch with labels only, as if it trained alone.

    The exception is `clip_grad`, whose norm is over all models.
    """
    return FinetuneConfig(
        gradients=GradientConfig(average="users"),
        paths_per_batch=depths,
        policy="shared",
        sandwich=True,
        distil_weight=0.0,
        train=replace(train, accumulate=depths),
    )
