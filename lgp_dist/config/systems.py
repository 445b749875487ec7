"""What a recipe becomes as another system: SN-Net, SWS, vanilla learngene, nested widths, or from scratch."""

from dataclasses import replace

from lgp_dist.config.budget import Budget
from lgp_dist.config.run_config import FinetuneConfig, GradientConfig, RowConfig, RunConfig, TrainConfig


def one_path_a_step(base: RunConfig) -> RunConfig:
    """The configuration with one path per rank and step in fine-tuning, at half of distillation's learning rate."""
    train = replace(base.distil.train, lr=base.distil.train.lr / 2)
    return replace(base, finetune=FinetuneConfig(train=train))


def undistilled(base: RunConfig, recipe: str) -> RunConfig:
    """SN-Net on the rows of another recipe, each trained with labels only; all else is unchanged."""
    rows = tuple(replace(row, source="labels", levels="none") for row in base.model.rows)
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, rows=rows),
        pool=replace(base.pool, stitch_init="least_squares"),
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
    rows = tuple(replace(row, source="random", levels="none") for row in base.model.rows)
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, rows=rows),
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
