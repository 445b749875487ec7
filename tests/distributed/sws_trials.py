"""Trainings of SWS on an engine, and what one process computes with stock ViTs and torch alone, no weights shared."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from exact_reference import DTYPES
from exact_trials import IMAGE, Engine
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import (
    DistilConfig,
    EngineConfig,
    FinetuneConfig,
    GradientConfig,
    Precision,
    RowConfig,
    TrainConfig,
)
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.sws import auxiliary_net, expand
from lgp_dist.models.vit import build_vit
from lgp_dist.paths.depths import DepthSpace
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.protocols import Batch, Task
from lgp_dist.tasks.distil import DistilTask
from lgp_dist.tasks.finetune import FinetuneTask

SOURCES = {3: (0, 1, 2), 4: (0, 1, 1, 2), 6: (0, 1, 1, 1, 2, 2)}
"""Layers of the models of the toy space, by hand."""
SPACE = DepthSpace(16, (1, 3, 2), tuple(SOURCES), **IMAGE)
ROW = RowConfig(width=16, heads=2, levels="none")
DISTIL = DistilConfig(alpha=0.0, inverse_weight=0.0)
IMAGES = 2
"""Of a rank's batch."""


@dataclass(frozen=True)
class SwsTrial:
    """One training run."""

    kind: Literal["distil", "finetune"]
    engine: Engine
    precision: Precision = "fp32"
    checkpointed: bool = False
    clip: float = 0.0
    accumulate: int = 1
    """Batches of a rank in a step."""
    world: int = 2
    steps: int = 3

    @property
    def name(self) -> str:
        """The trial in a few words, unique."""
        words = [self.kind, self.engine, self.precision, f"clip {self.clip}", f"x{self.accumulate}"]
        return ", ".join(words + ["checkpointed"] * self.checkpointed)

    @property
    def on_one_process(self) -> "SwsTrial":
        """The trial without what must not matter."""
        return replace(self, engine="ddp", checkpointed=False)

    @property
    def uses(self) -> int:
        """Micro-steps that each batch serves."""
        return len(SPACE.paths) if self.kind == "finetune" else 1

    def engine_config(self) -> EngineConfig:
        recompute = "on" if self.checkpointed else "off"
        return EngineConfig(precision=self.precision, device="cpu", threads=1, activation_checkpointing=recompute)

    def train_config(self) -> TrainConfig:
        """A large constant rate, and an epsilon at which AdamW does not blow up rounding (`exact_trials`)."""
        micro_steps = self.accumulate * self.uses
        return TrainConfig(
            epochs=1.0, batch_size=IMAGES * self.world * micro_steps, accumulate=micro_steps, lr=1e-2, min_lr=1e-2,
            warmup_epochs=0.0, weight_decay=0.1, eps=1e-3, clip_grad=self.clip, log_every=100,
        )  # fmt: skip

    def finetune_config(self) -> FinetuneConfig:
        """As the recipes train models of several depths."""
        return FinetuneConfig(
            gradients=GradientConfig(average="users"), paths_per_batch=self.uses, policy="shared", sandwich=True,
            distil_weight=0.0, train=self.train_config(),
        )  # fmt: skip

    def build(self) -> tuple[AuxiliaryRows | LearngenePool, Task]:
        """What is trained, and how; the same everywhere."""
        torch.manual_seed(1)
        auxiliary = auxiliary_net(SPACE, ROW, DISTIL)
        if self.kind == "distil":
            return auxiliary, DistilTask(auxiliary, build_ancestry(), DISTIL)
        pool, config = expand(SPACE, auxiliary.rows[0].vit, (2, 2, 2)), self.finetune_config()
        sampler = PathSampler(SPACE.paths, "shared", 0, config.train.accumulate, sandwich=True)
        return pool, FinetuneTask(pool, None, sampler, config)

    def batch(self, step: int, number: int, rank: int) -> Batch:
        """Random images and labels of one rank's batch."""
        generator = torch.Generator().manual_seed((step * 31 + number) * 31 + rank)
        images = torch.randn(IMAGES, 1, 14, 14, generator=generator)
        return Batch(images, torch.randint(5, (IMAGES,), generator=generator), torch.ones(IMAGES))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def build_ancestry() -> Ancestry:
    """The teacher; the same everywhere."""
    torch.manual_seed(2)
    return Ancestry(build_vit(**IMAGE, width=8, depth=1, heads=1))


@lru_cache(maxsize=32)
def reference(trial: SwsTrial, last_layer_alone: bool = False) -> dict[str, Tensor]:
    """The weights after the last step, from stock ViTs: each model of the pool by itself, or the untied auxiliary net,
    whose layers take the step of the sum of their stage's gradients.

    last_layer_alone: a mistake; a stage has the gradient of its last layer in place of the sum.
    """
    torch.set_num_threads(1)
    module, _ = trial.build()
    if trial.kind == "distil":
        prefix = "rows.0.vit."
        learnt = {name.removeprefix(prefix): value for name, value in module.state_dict().items()}
        trained = fit(trial, learnt, (0, 1, 1, 1, 2, 2), ".block", last_layer_alone)
        return {prefix + name: value for name, value in trained.items()}
    found = {}
    for path in SPACE.paths:
        trained = fit(trial, module.row_state(path.first_row), tuple(range(path.blocks)), "")
        found |= {f"{path.key}/{name}": value for name, value in trained.items()}
    return found


def fit(
    trial: SwsTrial, learnt: dict[str, Tensor], sources: tuple[int, ...], infix: str, last_layer_alone: bool = False
) -> dict[str, Tensor]:
    """Trains a stock ViT of as many layers as `sources` names and gives its weights under the names of `learnt`."""
    weights = {name: nn.Parameter(value.clone()) for name, value in learnt.items()}
    groups = [
        {"params": [p for n, p in weights.items() if p.ndim > 1 and n != "pos_embed"], "weight_decay": 0.1},
        {"params": [p for n, p in weights.items() if p.ndim == 1 or n == "pos_embed"], "weight_decay": 0.0},
    ]
    optimizer, ancestry = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3), build_ancestry()
    vit = VisionTransformer(
        img_size=14, patch_size=7, in_chans=1, num_classes=5, embed_dim=16, depth=len(sources), num_heads=2,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    owners = {}
    for name in vit.state_dict():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = f"{sources[int(parts[1])]}{infix}"
        owners[name] = ".".join(parts)
    for step in range(trial.steps):
        vit.load_state_dict({name: weights[owner].detach() for name, owner in owners.items()})
        vit.zero_grad()
        for rank in range(trial.world):
            for number in range(trial.accumulate):
                batch = trial.batch(step, number, rank)
                with torch.autocast("cpu", DTYPES[trial.precision], enabled=trial.precision != "fp32"):
                    logits, target = vit(batch.images).float(), ancestry(batch.images)[0].float()
                if trial.kind == "distil":
                    loss = -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
                else:
                    loss = F.cross_entropy(logits, batch.targets)
                (loss / trial.world / trial.accumulate).backward()
        for parameter in weights.values():
            parameter.grad = torch.zeros_like(parameter)
        for name, parameter in vit.named_parameters():
            owner = weights[owners[name]]
            owner.grad = parameter.grad.clone() if last_layer_alone else owner.grad + parameter.grad
        if trial.clip:
            nn.utils.clip_grad_norm_(weights.values(), trial.clip)
        optimizer.step()
    return {name: value.detach() for name, value in weights.items()}
