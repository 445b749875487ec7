"""Each function returns the complete configuration of a run. Variants call another one and change a few fields."""

from collections.abc import Callable
from dataclasses import replace

from lgp_dist.config.budget import Amount, Budget
from lgp_dist.config.own_recipe import OWN, OwnRecipe, is_own
from lgp_dist.config.run_config import (
    AncestryConfig,
    AugmentConfig,
    DataConfig,
    DistilConfig,
    EngineConfig,
    FinetuneConfig,
    ModelConfig,
    PoolConfig,
    RowConfig,
    RunConfig,
    TrainConfig,
)
from lgp_dist.config.systems import (
    both_ways,
    each_alone,
    from_ancestry,
    from_scratch,
    nested,
    one_path_a_step,
    tail_alone,
    undistilled,
)
from lgp_dist.errors import UserError, nearest

DEIT_AUGMENT = AugmentConfig(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)
"""The published augmentation of DeiT and of SN-Net's DeiT experiments, without repeated augmentation. As in timm, the
automatic augmentation replaces colour jitter."""


def deit_mix(train: TrainConfig) -> TrainConfig:
    """A stage's training with the mixing and smoothing of the same experiments."""
    return replace(train, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def fashion() -> RunConfig:
    """What the recipes for Fashion-MNIST, 28 x 28, share: rows of 6 blocks, 32 and 96 wide, and 16 epochs a stage."""
    loop = TrainConfig(
        epochs=16.0, batch_size=128, lr=1e-3, min_lr=1e-5, warmup_epochs=1.0, clip_grad=1.0, log_every=50
    )
    return RunConfig(
        data=DataConfig(
            root="shards/sample",
            val_split="test",
            image_size=28,
            channels=1,
            num_classes=10,
            mean=(0.2856,),
            std=(0.3527,),
            crop_pct=1.0,
            augment=AugmentConfig(crop_scale=(0.8, 1.0)),
            threads=0,
        ),
        model=ModelConfig(
            patch_size=7,
            depth=6,
            rows=(RowConfig(width=32, heads=1, levels="dense"), RowConfig(width=96, heads=3, levels="last")),
        ),
        engine=EngineConfig(precision="fp32"),
        ancestry=AncestryConfig(
            model="vit",
            width=96,
            depth=12,
            heads=3,
            source="file",
            weights="shards/sample/ancestry.safetensors",
            drop_path=0.0,
            train=replace(loop, epochs=24.0, label_smoothing=0.1),
        ),
        distil=DistilConfig(train=loop),
        pool=PoolConfig(stitch_init="least_squares"),
        finetune=FinetuneConfig(train=loop),
        budget=Budget(max_params=Amount(400e3)),
    )


def tiny() -> RunConfig:
    """The quickstart on Fashion-MNIST, 28 x 28: rows of 6 blocks, 32 and 96 wide, trained as studies found best.

    Rows start from the ancestry; distillation is short; stitches start by least squares; fine-tuning has both rows in
    every step, and a tenth of the learning rate for the wide one (docs/results.md).

    Command: scripts/quickstart
    Accuracy: 83.7 % (narrow row) to 86.4 % along the Pareto front; ancestry 89.25 % (seed 0, 2,000 test images)
    """
    return from_ancestry(fashion(), "tiny", distil=4.0, finetune=33.0)


def tiny_paper() -> RunConfig:
    """The paper's method on the quickstart's data: stitches from mean transformations, and its fine-tuning.

    One path per rank and step, distillation's learning rate everywhere, soft cross-entropy averaged over classes.

    Command: lgp run tiny_paper
    """
    base = fashion()
    return replace(
        base,
        recipe="tiny_paper",
        pool=PoolConfig(stitch_init="transformation_paper"),
        finetune=replace(base.finetune, loss_scale="paper"),
    )


def pool12() -> RunConfig:
    """The paper's pool of 12 instances on ImageNet-1K: rows of 6 blocks, 192 and 768 wide.

    Command: scripts/run_pool12
    Accuracy: not yet measured (paper: 57.00 narrow row, 75.05 wide row)
    """
    loop = TrainConfig(epochs=100.0, batch_size=128, lr=5e-4, warmup_epochs=5.0, log_every=50)
    return RunConfig(
        recipe="pool12",
        data=DataConfig(augment=DEIT_AUGMENT),
        engine=EngineConfig(precision="bf16", device="cuda"),
        distil=DistilConfig(train=deit_mix(loop)),
        finetune=FinetuneConfig(train=replace(loop, epochs=50.0)),
        budget=Budget(max_params=Amount(20e6)),
    )


def pool12_plus() -> RunConfig:
    """pool12 with what lifts its paths (docs/results.md): the same models and storage, the same multiply-adds to train.

    Rows start from DeiT-Base and are distilled for a quarter as long; stitches start by least squares; fine-tuning has
    the rest, with both rows in every step and a tenth of the rate for the wide one.

    Command: lgp run pool12_plus
    """
    return from_ancestry(pool12(), "pool12_plus", distil=25.0, finetune=156.0)


def pool36() -> RunConfig:
    """Rows of DeiT-Base's 12 blocks, 192, 384 and 768 wide, the last of them DeiT-Base itself: 71 paths.

    Otherwise as pool12_plus.

    Command: lgp run pool36
    """
    base = pool12_plus()
    rows = (
        RowConfig(width=192, heads=3, levels="dense", start="ancestry"),
        RowConfig(width=384, heads=6, levels="dense", start="ancestry"),
        RowConfig(width=768, heads=12, source="hub", model=base.ancestry.model),
    )
    finetune = replace(base.finetune, row_lr=(1.0, 1.0, 0.1), train=replace(base.finetune.train, epochs=50.0))
    return replace(base, recipe="pool36", model=replace(base.model, depth=12, rows=rows), finetune=finetune)


def pool18() -> RunConfig:
    """The paper's pool of 18 instances: pool12 with rows of 9 blocks.

    Command: lgp run pool18
    Accuracy: not yet measured (paper: 61.63 narrow row, 77.42 wide row)
    """
    base = pool12()
    return replace(base, recipe="pool18", model=replace(base.model, depth=9))


def snnet_tiny() -> RunConfig:
    """SN-Net on the quickstart's data: tiny's rows, trained with labels only, and least-squares stitches.

    Command: lgp run snnet_tiny
    """
    return undistilled(one_path_a_step(fashion()), "snnet_tiny")


def vanilla_tiny() -> RunConfig:
    """Vanilla learngene on the quickstart's data: three random blocks, then the ancestry's last three.

    Command: lgp run vanilla_tiny
    """
    return tail_alone(one_path_a_step(fashion()), "vanilla_tiny")


def scratch_tiny() -> RunConfig:
    """One path of tiny's pool from scratch; --finetune.only KEY with --run-dir trains another.

    Command: lgp run scratch_tiny
    """
    base = one_path_a_step(fashion())
    loop = replace(base.distil.train, epochs=base.distil.train.epochs + base.finetune.train.epochs)
    return from_scratch(base, "scratch_tiny", "r0.0-3+r1.4-5", loop)


def snnet_same_rows() -> RunConfig:
    """SN-Net as in the paper's comparison: pool12's rows, trained for 150 epochs with labels only.

    Command: lgp run snnet_same_rows
    Accuracy: not yet measured (paper: rows before stitching 53.49 and 67.20)
    """
    config = undistilled(pool12(), "snnet_same_rows")
    return replace(config, distil=replace(config.distil, train=replace(config.distil.train, epochs=150.0)))


def vanilla_base() -> RunConfig:
    """Vanilla learngene on ImageNet-1K: three random blocks, then DeiT-Base's last three.

    Command: lgp run vanilla_base
    """
    return tail_alone(pool12(), "vanilla_base")


def scratch_pool12() -> RunConfig:
    """One path of pool12 from scratch, 150 epochs; --finetune.only KEY with --run-dir trains another.

    Command: lgp run scratch_pool12
    """
    base = pool12()
    return from_scratch(base, "scratch_pool12", "r0.0-3+r1.4-5", replace(base.distil.train, epochs=150.0))


def snnet_deit() -> RunConfig:
    """SN-Net as published: DeiT-Ti, S and B on ImageNet-1K, 71 paths, 118.40 M stored parameters.

    --model.no-final-norm does as the released code. Repeated augmentation and stochastic depth are left out.

    Command: lgp run snnet_deit
    Accuracy: not yet measured (published: 70.56 Ti, 79.46 S, 81.93 B)
    """
    names = {"tiny": 192, "small": 384, "base": 768}
    rows = tuple(
        RowConfig(width=width, heads=width // 64, source="hub", model=f"deit_{name}_patch16_224")
        for name, width in names.items()
    )
    train = deit_mix(TrainConfig(epochs=50.0, batch_size=1024, lr=1e-4, warmup_epochs=5.0, log_every=50))
    return RunConfig(
        recipe="snnet_deit",
        data=DataConfig(augment=DEIT_AUGMENT),
        model=ModelConfig(depth=12, rows=rows),
        engine=EngineConfig(precision="bf16", device="cuda"),
        ancestry=AncestryConfig(model="regnety_160.deit_in1k"),
        pool=PoolConfig(stitch_init="least_squares"),
        finetune=FinetuneConfig(distil="hard", distil_weight=0.5, label_weight=0.5, train=train),
        budget=Budget(max_params=Amount(20e6)),
    )


def snnet_v2_s_l() -> RunConfig:
    """SN-Net v2 as published: DeiT-3 S and L on ImageNet-1K, stitched in both directions, 134 paths.

    Optimizer AdamW for LAMB. ThreeAugment, repeated augmentation and stochastic depth are left out.

    Command: lgp run snnet_v2_s_l
    Accuracy: not yet measured (published: 82.91 S, 86.98 L)
    """
    rows = tuple(
        RowConfig(width, heads, source="hub", model=f"deit3_{name}_patch16_224.fb_in22k_ft_in1k", depth=depth)
        for name, width, heads, depth in (("small", 384, 6, 12), ("large", 1024, 16, 24))
    )
    train = TrainConfig(
        epochs=50.0, batch_size=512, lr=3e-5, min_lr=1e-5, warmup_epochs=5.0, weight_decay=0.02, log_every=50
    )
    base = RunConfig(
        data=DataConfig(augment=AugmentConfig(color_jitter=0.3), crop_pct=1.0),
        model=ModelConfig(depth=12, rows=rows),
        engine=EngineConfig(precision="bf16", device="cuda"),
        pool=PoolConfig(samples=100),
        finetune=FinetuneConfig(train=replace(train, cutmix=1.0, label_smoothing=0.1)),
        budget=Budget(max_params=Amount(100e6)),
    )
    return both_ways(base, "snnet_v2_s_l", rank=64, bin_flops=1e9)


def snnet_v2_b_l() -> RunConfig:
    """SN-Net v2 as published: snnet_v2_s_l with DeiT-3 B and L, 134 paths.

    Command: lgp run snnet_v2_b_l
    """
    base = snnet_v2_s_l()
    row = RowConfig(768, 12, source="hub", model="deit3_base_patch16_224.fb_in22k_ft_in1k", depth=12)
    return replace(base, recipe="snnet_v2_b_l", model=replace(base.model, rows=(row, base.model.rows[1])))


def snnet_v2_tiny() -> RunConfig:
    """SN-Net v2 on the quickstart's data: snnet_tiny's rows, stitched in both directions, 32 paths.

    Command: lgp run snnet_v2_tiny
    """
    return both_ways(snnet_tiny(), "snnet_v2_tiny", rank=8, bin_flops=0.25e6)


def sws_small() -> RunConfig:
    """SWS as published, on ImageNet-1K: width 384, auxiliary net of 16 layers in stages 3-3-4-3-3.

    The published ancestry is LeViT-384 (--ancestry.model levit_384.fb_dist_in1k). Repeated augmentation and averaged
    weights are left out.

    Command: lgp run sws_small
    """
    loop = deit_mix(TrainConfig(epochs=150.0, batch_size=512, lr=5e-4, warmup_epochs=5.0, log_every=50))
    depths = (6, 8, 10, 12)
    return RunConfig(
        recipe="sws_small",
        data=DataConfig(augment=DEIT_AUGMENT),
        engine=EngineConfig(precision="bf16", device="cuda"),
        model=ModelConfig(
            depth=16,
            rows=(RowConfig(width=384, heads=6, levels="none", drop_path=0.1),),
            stages=(3, 3, 4, 3, 3),
            depths=depths,
        ),
        distil=DistilConfig(alpha=0.0, inverse_weight=0.0, train=loop),
        finetune=each_alone(len(depths), replace(loop, epochs=10.0, lr=5e-5, warmup_epochs=0.0)),
        budget=Budget(max_params=Amount(20e6)),
    )


def sws_base() -> RunConfig:
    """SWS as published: sws_small with width 768.

    Command: lgp run sws_base
    """
    base = sws_small()
    row, finetune = replace(base.model.rows[0], width=768, heads=12), base.finetune
    return replace(
        base,
        recipe="sws_base",
        model=replace(base.model, rows=(row,)),
        distil=replace(base.distil, train=replace(base.distil.train, epochs=100.0)),
        finetune=replace(finetune, train=replace(finetune.train, lr=1e-5)),
        budget=Budget(max_params=Amount(65e6)),
    )


def sws_tiny() -> RunConfig:
    """SWS on the quickstart's data: width 96, auxiliary net of 6 layers in stages 2-2-2.

    Command: lgp run sws_tiny
    Time: not yet measured on a machine of its own
    Accuracy: 82.95 % (3 blocks) to 83.80 % (6 blocks), before fine-tuning 75.10 to 83.60 % (seed 0, 2,000 test images)
    """
    base, depths = fashion(), (3, 4, 5, 6)
    return replace(
        base,
        recipe="sws_tiny",
        model=replace(base.model, rows=(RowConfig(width=96, heads=3, levels="none"),), stages=(2, 2, 2), depths=depths),
        distil=replace(base.distil, alpha=0.0, inverse_weight=0.0),
        finetune=each_alone(
            len(depths), replace(base.finetune.train, epochs=4.0, lr=2e-4, warmup_epochs=0.0, clip_grad=0.0)
        ),
    )


def nested_tiny() -> RunConfig:
    """Nested widths on the quickstart's data: one ViT, 96 wide, whose first 24, 48 and 72 channels are models.

    Command: lgp run nested_tiny
    """
    base = fashion()
    epochs = base.distil.train.epochs + base.finetune.train.epochs
    loop = replace(base.distil.train, epochs=epochs, lr=2e-3)
    return nested(base, "nested_tiny", RowConfig(width=96, heads=4, source="random"), (24, 48, 72, 96), loop)


def nested_base() -> RunConfig:
    """Nested widths on ImageNet-1K: DeiT-Base's shape, whose first 192, 384 and 576 channels are models.

    As many multiply-adds as pool12.

    Command: lgp run nested_base
    """
    base = pool12()
    loop = replace(base.distil.train, epochs=53.0, batch_size=1024)
    row = RowConfig(width=768, heads=12, source="random")
    config = nested(base, "nested_base", row, (192, 384, 576, 768), loop)
    return replace(config, model=replace(config.model, depth=12))


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        *(tiny, tiny_paper, pool12, pool12_plus, pool18, pool36, snnet_tiny, vanilla_tiny, scratch_tiny),
        *(snnet_deit, snnet_same_rows, vanilla_base, scratch_pool12, snnet_v2_tiny, snnet_v2_s_l, snnet_v2_b_l),
        *(sws_tiny, sws_small, sws_base, nested_tiny, nested_base),
    )
}
"""Every recipe of this package by its name."""


def known_recipes() -> dict[str, Callable[[], RunConfig]]:
    """RECIPES, and those of people's own files that this command line has named."""
    return {**RECIPES, **OWN}


def recipe_of(name: str) -> RunConfig:
    """The recipe that a command line names, which may be FILE.py:FUNCTION; UserError for an unknown name."""
    if is_own(name):
        OWN[name] = OwnRecipe(name)
    elif name not in RECIPES:
        advice = nearest(name, RECIPES, f"take {', '.join(RECIPES)}, or write FILE.py:FUNCTION")
        raise UserError(f"There is no recipe {name!r}: {advice}.")
    return known_recipes()[name]()
