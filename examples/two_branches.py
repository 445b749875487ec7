"""A convolutional network with two branches: in every step, two ranks train different branches.

accelerate launch --config_file launch_configs/cpu_2.yaml --zero_stage 2 examples/two_branches.py OUT
"""

import os
import sys

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lgp_dist.api import Batch, EngineConfig, OwnTask, StepContext, TrainConfig, train


class Part(nn.Sequential):
    """Layers that some branches use; on any other branch they return their input."""

    def forward(self, inputs: Tensor, branch: str) -> Tensor:
        return super().forward(inputs) if branch in self.branches else inputs


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Part(nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU())
        self.wide = Part(nn.Conv2d(8, 8, 5, padding=2), nn.ReLU())
        self.narrow = Part(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = Part(nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
        for part, branches in zip(self.children(), ("wn", "w", "n", "wn"), strict=True):
            part.branches = branches

    def forward(self, images: Tensor, branch: str) -> Tensor:
        for part in self.children():
            images = part(images, branch)
        return images


def branch(place: StepContext) -> str:
    """The branch that a rank trains in a step: `w` or `n`; ranks take turns."""
    return "wn"[(place.step + place.rank) % 2]


def batches(place: StepContext) -> Batch:
    draw = torch.Generator().manual_seed(100 * place.step + place.rank)
    images, labels = torch.randn(4, 1, 14, 14, generator=draw), torch.randint(5, (4,), generator=draw)
    return Batch(images, labels, torch.ones(4))


def task() -> OwnTask:
    torch.manual_seed(0)
    return OwnTask(  # order, skippable and uses: docs/api.md explains them
        TwoBranches(),
        loss=lambda module, batch, place: nn.functional.cross_entropy(
            module(batch.images, branch(place)), batch.targets
        ),
        order=("stem", "wide", "narrow", "head"),
        skippable=("wide", "narrow"),
        uses=lambda place: {"w": ("wide",), "n": ("narrow",)}[branch(place)],
    )


CONFIG = TrainConfig(lr=1e-2, min_lr=1e-2, warmup_epochs=0.0, eps=1e-3)

if __name__ == "__main__":
    own = task()
    train(own, batches, 6, sys.argv[1], CONFIG, EngineConfig(precision="fp32", device="cpu"))
    if os.environ.get("RANK", "0") == "0":
        save_file(own.module.state_dict(), f"{sys.argv[1]}/network.safetensors")
