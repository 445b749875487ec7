"""Trials of the table of exactness: what is trained, on which engine and with which settings."""

import random
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import torch

from lgp_dist.config.run_config import (
    EngineConfig,
    FinetuneConfig,
    GradientConfig,
    Ops,
    Precision,
    StitchSharing,
    TrainConfig,
)
from lgp_dist.engine.workers import choose_attention
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.nested import NestedPool
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.vit import build_vit
from lgp_dist.paths.nested import NestedSpace
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch

Engine = Literal["zero0", "zero1", "zero2", "zero3", "ddp"]
ENGINES: tuple[Engine, ...] = ("zero0", "zero1", "zero2", "zero3", "ddp")

IMAGE = {"image_size": 14, "patch_size": 7, "channels": 1, "num_classes": 5}
BATCH = 2
"""Images of a rank's micro-step."""


@dataclass(frozen=True)
class Trial:
    """One training run."""

    engine: Engine
    world: int
    precision: Precision = "fp32"
    accumulate: int = 1
    clip: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    checkpointed: bool = False
    unused: Literal["skip", "zero"] = "skip"
    average: Literal["all", "users"] = "all"
    reduction: Literal["all", "union"] = "all"
    offload: bool = False
    compile: str = ""
    ops: Ops = "reference"
    row_lr: tuple[float, ...] = ()
    rows: int = 2
    final_norm: bool = True
    stitch_sharing: StitchSharing = "window"
    two_way: bool = False
    """Rows of three and six blocks, stitched in both directions."""
    stitch_rank: int = 0
    feature_weight: float = 0.0
    lead_weight: float = 0.0
    """Above 0: all micro-steps of a rank are one group on the same images, which the widest row leads."""
    ema: float = 0.0
    nested: bool = False
    """Three nested widths, which each group trains in turn, each learning from the one before; needs lead_weight."""
    steps: int = 4
    seed: int = 0
    loss_scale: float = 2.0**16
    broken: Literal["", "contract", "order", "schedule", "weights"] = ""
    """What the worker breaks, to see that it is noticed."""
    audit: bool = True
    """Whether the smoke alarm is on."""

    @property
    def name(self) -> str:
        """The trial in a few words, unique."""
        words = [self.engine, f"{self.world} ranks", self.precision, f"x{self.accumulate}", f"clip {self.clip}"]
        words += [self.optimizer, self.unused, f"seed {self.seed}"]
        words += [f"average {self.average}"] * (self.average != "all") + ["union"] * (self.reduction == "union")
        words += ["checkpointed"] * self.checkpointed + ["offload"] * self.offload + [self.compile] * bool(self.compile)
        words += [self.ops] * (self.ops != "reference")
        words += [f"row rates {' '.join(map(str, self.row_lr))}"] * bool(self.row_lr)
        words += [f"loss scale {self.loss_scale:g}"] * (self.loss_scale != 2.0**16)
        words += [f"broken {self.broken}", f"audit {self.audit}"] * bool(self.broken)
        words += ["a stitch layer for each path"] * (self.stitch_sharing == "path") + ["two-way"] * self.two_way
        words += [f"stitches of rank {self.stitch_rank}"] * bool(self.stitch_rank)
        words += [f"features {self.feature_weight}"] * bool(self.feature_weight)
        words += [f"lead path {self.lead_weight}"] * bool(self.lead_weight)
        words += [f"ema {self.ema}"] * bool(self.ema) + ["nested widths"] * self.nested
        words += ["no final norm"] * (not self.final_norm)
        words += [f"{self.rows} rows"] * (self.rows != 2) + [f"{self.steps} steps"] * (self.steps != 4)
        return ", ".join(words)

    @property
    def on_one_process(self) -> "Trial":
        """The trial without what must not matter: the reference is the same for all engines."""
        return replace(self, engine="ddp", checkpointed=False, reduction="all", offload=False, compile="")

    def engine_config(self) -> EngineConfig:
        """Settings of the engine."""
        return EngineConfig(
            precision=self.precision,
            device="cpu",
            threads=1,
            activation_checkpointing=("auto" if self.engine == "zero3" else "on") if self.checkpointed else "off",
            compile=self.compile,
            ops=self.ops,
            offload_optimizer=self.offload,
            reduction=self.reduction,
            audit=self.audit,
            audit_weights_every=2,
            fp16_scale=self.loss_scale,
        )

    def train_config(self) -> TrainConfig:
        """A large constant rate, so that an error shows, and an epsilon at which AdamW does not turn rounding of a
        gradient that is zero in exact arithmetic (the attention's key bias) into a step of full size."""
        rate = 0.1 if self.optimizer == "sgd" else 1e-2
        return TrainConfig(
            epochs=1.0,
            batch_size=BATCH * self.world * self.accumulate,
            accumulate=self.accumulate,
            lr=rate,
            min_lr=rate,
            warmup_epochs=0.0,
            optimizer=self.optimizer,
            momentum=0.9,
            weight_decay=0.1,
            eps=1e-3,
            clip_grad=self.clip,
            ema=self.ema,
            log_every=100,
        )

    def finetune_config(self) -> FinetuneConfig:
        """What becomes of parameters that not every path has, and who teaches."""
        return FinetuneConfig(
            gradients=GradientConfig(self.unused, self.average),
            feature_weight=self.feature_weight,
            lead_weight=self.lead_weight,
            policy="in_turn" if self.nested else "independent",
            paths_per_batch=self.accumulate if self.lead_weight else 1,
        )

    def build(self) -> tuple[LearngenePool, Ancestry, PathSampler]:
        """A pool of rows of six blocks (18 paths with two rows), an ancestry and the schedule; the same everywhere.

        A two-way pool has rows of three and six blocks and 8 paths.
        """
        choose_attention("cpu", self.precision)
        torch.manual_seed(1)
        depth = 6 if self.rows == 2 else 3
        shape = {"final_norm": self.final_norm, "stitch_sharing": self.stitch_sharing}
        if self.nested:
            space = NestedSpace((8, 16, 24), 3, 8, **IMAGE)
            pool = NestedPool.empty(space, space.heads)
        else:
            if self.two_way:
                shape |= {"two_way": True, "row_depths": (3, 6)}
            space = PathSpace((8, 16, 24)[: self.rows], depth, **IMAGE, **shape)
            pool = LearngenePool.empty(space, (1, 2, 3)[: self.rows], self.stitch_rank)
            pool.set_ops(self.ops)
        width = space.widths[-1] if self.feature_weight else 8
        vit = build_vit(image_size=14, patch_size=7, channels=1, num_classes=5, width=width, depth=1, heads=1)
        choose_attention("cpu", "fp32")
        lead_every = self.accumulate if self.lead_weight and not self.nested else 0
        policy = self.finetune_config().policy
        sampler = PathSampler(space.paths, policy, self.seed, self.accumulate, lead_every=lead_every)
        return pool, Ancestry(vit), sampler

    def batch(self, step: int, micro: int, rank: int) -> Batch:
        """Random images and labels of one rank's micro-step; with a lead path, of its group."""
        micro = 0 if self.lead_weight else micro
        generator = torch.Generator().manual_seed(((self.seed * 997 + step) * 31 + micro) * 31 + rank)
        images = torch.randn(BATCH, 1, 14, 14, generator=generator)
        return Batch(images, torch.randint(5, (BATCH,), generator=generator), torch.ones(BATCH))

    @property
    def observed(self) -> bool:
        """Whether the worker notes what every path gives and what is gathered and kept: a third of a trial's time."""
        return self.optimizer == "sgd" or self.checkpointed

    def world_at(self, step: int) -> int:
        """Ranks in a step."""
        return self.world

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def table(worlds: tuple[int, ...] = (2, 4)) -> list[Trial]:
    """Every engine x precision x accumulation x clipping x optimizer x activation checkpointing."""
    settings = product(worlds, ENGINES, ("fp32", "bf16"), (1, 2), (0.0, 0.5), ("sgd", "adamw"), (False, True))
    return [
        Trial(engine, world, precision, accumulate, clip, optimizer, checkpointed)
        for world, engine, precision, accumulate, clip, optimizer, checkpointed in settings
    ]


def extras() -> list[Trial]:
    """What the table leaves out: fp16, other rules for unused parameters, three rows or one, stitched paths without the
    final norm, the options beyond the paper, both directions, nested widths, offload, union, compilation, one rank."""
    trials = []
    for engine in ENGINES:
        base = Trial(engine, 2, accumulate=2, clip=0.5)
        trials += [
            replace(base, precision="fp16", loss_scale=2.0**14, steps=5),
            replace(base, unused="zero"),
            replace(base, average="users"),
            replace(base, rows=3, steps=6),
            replace(base, rows=3, steps=6, final_norm=False),
            replace(base, rows=1),
            replace(base, row_lr=(0.5, 0.125)),
            replace(base, compile="aot_eager", checkpointed=True),
            replace(base, stitch_sharing="path", ema=0.8),
            replace(base, feature_weight=0.5, checkpointed=True),
            replace(base, lead_weight=1.0, feature_weight=0.5, rows=3, accumulate=3),
            replace(base, lead_weight=1.0, nested=True, accumulate=3, checkpointed=engine == "zero3"),
            Trial(engine, 4, accumulate=2, lead_weight=1.0, feature_weight=0.5, rows=3, stitch_sharing="path", ema=0.8),
            replace(base, two_way=True, stitch_rank=2, steps=6),
            Trial(engine, 4, two_way=True, stitch_rank=2, feature_weight=0.5, checkpointed=True),
        ]
        if engine in ("zero1", "zero2"):
            trials += [replace(base, reduction="union", unused=unused) for unused in ("skip", "zero")]
        if engine in ("zero1", "zero2", "zero3"):
            trials.append(replace(base, offload=True))
    return trials + [Trial(engine, 1, accumulate=2, clip=0.5) for engine in ENGINES]


def sample(large: bool = False) -> list[Trial]:
    """A part of both that every push runs: each engine with three rows of the table on 2 ranks, three engines with one
    on 4, and every second extra, ZeRO-2 and ZeRO-3 with offload and union.

    large: each engine also on 4 ranks, ZeRO-2 and ZeRO-3 with all extras.
    """
    trials = [
        trial
        for place, trial in enumerate(extras())
        if place % 2
        or trial in unfused()
        or trial.engine in ("zero2", "zero3")
        and (large or trial.offload or trial.reduction == "union")
    ]
    for engine in ENGINES:
        trials += [
            Trial(engine, 2, optimizer="sgd"),
            Trial(engine, 2, precision="bf16", accumulate=2, clip=0.5, checkpointed=True),
            Trial(engine, 2, clip=0.5, seed=1),
        ]
        if large or engine in ("zero1", "zero2", "zero3"):
            trials.append(Trial(engine, 4, precision="bf16", clip=0.5))
    return trials + [replace(trial, ops="fused") for trial in trials if trial in unfused()]


def unfused() -> list[Trial]:
    """Trials that are also trained with fused operations: without and with checkpointing and compilation."""
    compiled = {"compile": "aot_eager", "checkpointed": True, "accumulate": 2, "clip": 0.5}
    return [Trial(engine, 2, optimizer="sgd") for engine in ENGINES] + [
        Trial(engine, 2, **compiled) for engine in ENGINES if engine != "ddp"
    ]


def schedules(count: int, seed: int = 0) -> list[Trial]:
    """Random schedules of paths, each on an engine and with settings drawn at random."""
    draw = random.Random(seed)
    return [
        Trial(
            draw.choice(ENGINES),
            draw.choice((2, 2, 2, 4)),
            draw.choice(("fp32", "bf16")),
            draw.choice((1, 2)),
            draw.choice((0.0, 0.5)),
            draw.choice(("sgd", "adamw")),
            draw.choice((False, True)),
            unused=draw.choice(("skip", "skip", "zero")),
            steps=3,
            seed=1000 + index,
        )
        for index in range(count)
    ]
