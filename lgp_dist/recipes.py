"""A function is a complete run. Variants call another and change a few fields."""

from dataclasses import replace

from lgp_dist.budget import Amount, Budget
from lgp_dist.config import (
    AncestryConfig,
    AugmentConfig,
    DataConfig,
    DistilConfig,
    EngineConfig,
    FinetuneConfig,
    ModelConfig,
    RowConfig,
    RunConfig,
    TrainConfig,
)

DEIT_AUGMENT = AugmentConfig(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)
"""The published augmentation of DeiT and of SN-Net's DeiT experiments (both without repeated augmentation here). As in
timm, colour jitter gives way to an automatic augmentation."""

DEIT_MIX = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
"""The mixing of the same recipes, for a TrainConfig."""


def tiny() -> RunConfig:
    """The quickstart: Fashion-MNIST at 28 x 28, 17 tokens, rows of 6 blocks and widths 32 and 96.

    Command: scripts/quickstart
    Time: 8 minutes on two cores of an AMD EPYC
    Accuracy: 74.8 % (narrow row) to 83.4 % along the Pareto front; ancestry 89.25 % (seed 0, 2,000 test images)
    """
    loop = TrainConfig(
        epochs=16.0, batch_size=128, lr=1e-3, min_lr=1e-5, warmup_epochs=1.0, clip_grad=1.0, log_every=50
    )
    return RunConfig(
        recipe="tiny",
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
        finetune=FinetuneConfig(train=replace(loop, lr=5e-4)),
        budget=Budget(max_params=Amount(400e3)),
    )


def pool12() -> RunConfig:
    """Learngene Pool of 12 instances on ImageNet-1K with the paper's settings: rows of 6 blocks, widths 192 and 768.

    Command: scripts/run_pool12
    Time: not yet measured
    Accuracy: not yet measured (paper: 57.00 narrow row, 75.05 wide row)
    """
    loop = TrainConfig(epochs=100.0, batch_size=128, lr=5e-4, warmup_epochs=5.0, log_every=50)
    return RunConfig(
        recipe="pool12",
        data=DataConfig(augment=DEIT_AUGMENT),
        engine=EngineConfig(precision="bf16", device="cuda"),
        distil=DistilConfig(train=replace(loop, **DEIT_MIX)),
        finetune=FinetuneConfig(train=replace(loop, epochs=50.0)),
        budget=Budget(max_params=Amount(20e6)),
    )


def pool18() -> RunConfig:
    """Learngene Pool of 18 instances: as pool12 with rows of 9 blocks.

    Command: lgp run pool18
    Time: not yet measured
    Accuracy: not yet measured (paper: 61.63 narrow row, 77.42 wide row)
    """
    base = pool12()
    return replace(base, recipe="pool18", model=replace(base.model, depth=9))


RECIPES = {"tiny": tiny, "pool12": pool12, "pool18": pool18}
