"""What it costs that every rank has a path of its own: time, bytes and memory of a step on this launch's engine."""

import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from lgp_dist.bench.common import facts, join, leave, spread, wait
from lgp_dist.bench.sampler import with_policy
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.comm_stats import CommStats, Gathered, peak_bytes, reset_peak
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.trainer import Trainer
from lgp_dist.engine.workers import Workers
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.build import ancestry_vit
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.cost import TRAINING, ancestry_forward
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import heads_of, space_of
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.tasks.finetune import FinetuneTask

POLICIES = ("shared", "independent", "balanced")
"""What is compared: all ranks on one path, each on its own, and that with equal work."""
COUNTED = 8
"""Steps of each policy whose bytes are counted and whose memory is looked at."""


def bench_engine(config: RunConfig, out: Path, rounds: int = 5, steps: int = 24) -> list[dict[str, Any]]:
    """Fine-tunes a recipe's pool on random images on the engine of this launch; rank 0 writes a list of objects.

    Policies take turns within each round, so that a slow moment of the machine meets all of them. One object for each
    policy: engine, ranks, micro_steps, ms (of an optimizer step: median over rounds), spread ((most - least) / median),
    gflops (mean of a rank's paths in a step, an image's forward), ms_per_work (ms over gflops: what it takes to train
    the same work), gmacs and gmacs_slowest (multiply-adds of a step's forwards and backwards, the ancestry's too, of a
    mean rank and of those that others wait for), bytes (that a rank gives to collectives in a step, by operation),
    bytes_unused (of the gradients of parameters that no rank used, in the same steps), peak_mb (largest over ranks)
    and, under ZeRO-3, the most units and elements gathered at once, and the elements of the largest unit. UserError
    where rounds or steps are below 1.
    """
    bench = Bench(config, join(config, rounds=rounds, steps=steps))
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for turn in range(rounds + 1):
        for policy in POLICIES:
            took = bench.timed(policy, range(turn * steps, (turn + 1) * steps))
            if turn:
                seconds[policy].append(took / steps)
    rows = [bench.row(policy, seconds[policy], range(steps, (rounds + 1) * steps)) for policy in POLICIES]
    bench.end(out, rows)
    return rows


class Bench:
    """The pool of a recipe on the engine of a launch, with random images that stay the same."""

    def __init__(self, config: RunConfig, workers: Workers):
        self.config, self.workers = config, workers
        self.train, self.space = config.finetune.train, space_of(config)
        torch.manual_seed(config.seed)
        pool = LearngenePool.empty(self.space, heads_of(config)).to(workers.device)
        ancestry = Ancestry(ancestry_vit(config)) if config.finetune.distil_weight else None
        meet = "micro_step" if workers.launch.zero_stage >= 2 and workers.engine.reduction == "all" else "step"
        self.samplers = {
            policy: PathSampler.from_config(with_policy(config, policy, self.train.accumulate, meet), self.space)
            for policy in POLICIES
        }
        if ancestry is not None:
            precision = config.engine.ancestry(config.finetune.ancestry_precision)
            ancestry.to(workers.device).prepare(precision, config.engine.compile)
        pool.set_ops(config.engine.ops)
        self.task = FinetuneTask(pool.train(), ancestry, self.samplers["shared"], config.finetune)
        self.task.to(workers.device)
        self.gathered = Gathered(pool, pool.ordered_modules)
        self.units = {name: _numbers(pool.get_submodule(name)) for name in pool.ordered_modules}
        self.parts = {name: _numbers(pool.get_submodule(name)) for name in pool.skippable_modules}
        optimizer = build_optimizer(pool, self.train, skippable=pool.skippable_modules)
        self.trainer = Trainer(workers, self.task, optimizer, self.train, config.finetune.gradients)
        self.traffic = CommStats(self.trainer.module)
        images = self.train.batch_size // (workers.world * self.train.accumulate)
        shape = (images, self.space.channels, self.space.image_size, self.space.image_size)
        targets = torch.randint(self.space.num_classes, (images,))
        self.batch = Batch(torch.randn(shape), targets, torch.ones(images)).to(workers.device)

    def step(self, step: int) -> None:
        """One optimizer step."""
        self.trainer.begin(step)
        for micro in range(self.train.accumulate):
            with self.trainer.micro_step(step, micro) as context:
                with self.workers.autocast():
                    loss = self.task.losses(self.trainer.module, self.batch, context)["loss"]
                self.trainer.backward(loss)
        self.trainer.finish(step)

    def timed(self, policy: str, steps: range) -> float:
        """Seconds of these steps, from when all ranks begin until all have ended."""
        self.task.sampler = self.samplers[policy]
        self.wait()
        began = time.perf_counter()
        for step in steps:
            self.step(step)
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until all ranks' devices have done what they were given."""
        wait(self.workers)

    def end(self, out: Path, rows: list[dict[str, Any]]) -> None:
        """Rank 0 writes the objects; all ranks leave."""
        self.trainer.close()
        leave(self.workers, out, rows)

    def _schedule(self, step: int) -> list[list[Any]]:
        """The paths of a step by rank."""
        count = range(self.train.accumulate)
        return [
            [self.task.path(StepContext(step, micro, rank, self.workers.world)) for micro in count]
            for rank in range(self.workers.world)
        ]

    def _work(self, step: int) -> float:
        schedule = self._schedule(step)
        return fmean(sum(self.space.cost(path).flops for path in row) for row in schedule) / 1e9

    def _waited(self, step: int) -> float:
        """Forward and backward of an image on the paths that others wait for, in a step or in every micro-step."""
        schedule = [[self.space.cost(path).flops for path in row] for row in self._schedule(step)]
        if self.workers.launch.zero_stage >= 2 and self.workers.engine.reduction == "all":
            return TRAINING * sum(map(max, zip(*schedule, strict=True))) / 1e9
        return TRAINING * max(map(sum, schedule)) / 1e9

    def _unused(self, step: int) -> int:
        used = frozenset().union(*(self.task.module.modules_of(path) for row in self._schedule(step) for path in row))
        return sum(4 * size for part, size in self.parts.items() if part not in used)

    def row(self, policy: str, seconds: list[float], steps: range) -> dict[str, Any]:
        """The object of one policy. steps: those that were timed."""
        self.task.sampler = self.samplers[policy]
        reset_peak(self.workers.device)
        with self.traffic.counting() as sent:
            for step in range(COUNTED):
                self.step(step)
        peak = torch.zeros(self.workers.world, dtype=torch.float64)
        peak[self.workers.rank] = peak_bytes(self.workers.device) / 2**20
        ms, work = 1000 * median(seconds), fmean(map(self._work, steps))
        launch, images = self.workers.launch, len(self.batch.images)
        teacher = (ancestry_forward(self.config) or 0.0) * self.train.accumulate / 1e9
        row = {
            "recipe": self.config.recipe,
            "engine": launch.engine_name,
            "reduction": self.workers.engine.reduction,
            "policy": policy,
            "ranks": self.workers.world,
            "micro_steps": self.train.accumulate,
            "widths": list(self.space.widths),
            "images": self.train.batch_size,
            "precision": self.workers.engine.precision,
            "ms": round(ms, 2),
            "spread": spread(seconds),
            "gflops": round(work, 5),
            "ms_per_work": round(ms / work, 2),
            "gmacs": round(images * (TRAINING * work + teacher), 5),
            "gmacs_slowest": round(images * (fmean(map(self._waited, steps)) + teacher), 5),
            "bytes": {name: size // COUNTED for name, size in sorted(sent.items())},
            "bytes_weights": 4 * sum(self.units.values()),
            "bytes_unused": round(fmean(map(self._unused, range(COUNTED)))),
            "peak_mb": round(float(self.workers.sum(peak).max()), 1),
        }
        if launch.deepspeed and launch.zero_stage == 3:
            largest = max(self.units.values())
            row |= {"units": self.gathered.units, "elements": self.gathered.elements, "largest_unit": largest}
        return row | facts(self.workers.device)


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def engine_table(rows: list[dict[str, Any]]) -> str:
    """The objects of `bench_engine` as text; `against shared` compares ms_per_work within an engine."""
    base = {(row["engine"], row["reduction"]): row["ms_per_work"] for row in rows if row["policy"] == "shared"}
    lines = [f"{'engine':<14}{'policy':<13}{'ms':>9}{'spread':>8}{'against shared':>16}{'MB sent':>10}{'MB peak':>9}"]
    for row in rows:
        ratio = row["ms_per_work"] / base[row["engine"], row["reduction"]]
        name = row["engine"] + (" union" if row["reduction"] == "union" else "")
        sent = sum(row["bytes"].values()) / 2**20
        lines.append(
            f"{name:<14}{row['policy']:<13}{row['ms']:>9.1f}{row['spread']:>8.0%}{ratio:>16.3f}{sent:>10.2f}"
            f"{row['peak_mb']:>9.0f}"
        )
    return "\n".join(lines)
