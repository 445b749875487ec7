"""The cases that worker and reference both run, and what they build them from."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lgp_dist.config import AugmentConfig, DataConfig, Policy, Precision, TrainConfig
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.vit import build_vit
from lgp_dist.paths import PathSpace

SEED, STEPS, BATCH = 5, 5, 16
SHARDS = Path(__file__).parents[2] / "shards" / "sample"


@dataclass(frozen=True)
class Case:
    """One run."""

    policy: Policy
    accumulate: int
    clip_grad: float
    precision: Precision
    eps: float = 1e-8
    """With clipping the norm is summed in another order; a larger epsilon keeps Adam from making a step of full size of
    a gradient that is zero but for rounding, such as that of the attention's key bias."""

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.accumulate}-{self.clip_grad}-{self.precision}"


CASES = (
    Case("shared", 1, 0.0, "fp32"),
    Case("independent", 1, 0.0, "fp32"),
    Case("independent", 2, 0.5, "fp32", eps=1e-3),
    Case("independent", 2, 0.5, "bf16", eps=1e-3),
)


def train_config(case: Case) -> TrainConfig:
    """A loop of STEPS steps with a large rate, so that an error shows."""
    return TrainConfig(
        epochs=1.0,
        batch_size=BATCH,
        accumulate=case.accumulate,
        lr=1e-2,
        min_lr=1e-3,
        warmup_epochs=0.4,
        weight_decay=0.1,
        eps=case.eps,
        clip_grad=case.clip_grad,
        log_every=2,
    )


def small_data() -> DataConfig:
    """The sample shards."""
    return DataConfig(
        root=str(SHARDS),
        image_size=28,
        channels=1,
        num_classes=10,
        mean=(0.2856,),
        std=(0.3527,),
        augment=AugmentConfig(crop_scale=(0.8, 1.0)),
        workers=0,
    )


def build() -> tuple[LearngenePool, Ancestry]:
    """A pool of two rows of three blocks and an ancestry, the same in every process."""
    torch.manual_seed(SEED)
    space = PathSpace((16, 32), 3, image_size=28, patch_size=7, channels=1, num_classes=10)
    vit = build_vit(image_size=28, patch_size=7, channels=1, num_classes=10, width=32, depth=2, heads=2)
    return LearngenePool.empty(space, (1, 2)), Ancestry(vit)
