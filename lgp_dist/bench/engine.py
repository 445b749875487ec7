"""What a path for every rank costs: time, bytes and memory of a step on the engine of this launch."""

import time
from itertools import repeat
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from lgp_dist.bench.common import facts, finetune_models, join, leave, measured, micro_batch, spread, wait
from lgp_dist.bench.sampler import with_policy
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.comm_stats import CommStats, Gathered, peak_bytes, reset_peak
from lgp_dist.engine.loop import take_step
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.trainer import Trainer
from lgp_dist.engine.workers import Workers
from lgp_dist.paths.cost import TRAINING, ancestry_forward
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.tasks.finetune import finetune_task

POLICIES = ("shared", "independent", "balanced")
"""What is compared: all ranks on one path, each on its own, and each on its own with equal work."""
COUNTED = 8
"""Steps of each policy in which bytes are counted and memory is read."""
COLUMNS = (("engine", "reduction", "policy", "ms", "spread", "ms_per_work", "to_shared", "sent_mb", "peak_mb"),)


def bench_engine(config: RunConfig, out: Path, rounds: int = 5, steps: int = 24) -> list[dict[str, Any]]:
    """Fine-tunes a recipe's pool on random images on the engine of this launch; rank 0 writes a list of objects.

    Policies take turns within each round, so that a slow moment of the machine affects all of them. Of each policy:

    engine, ranks, micro_steps; ms of an optimizer step, median over rounds, and spread ((most - least) / median);
    gflops, mean of a rank's paths in a step, an image's forward; ms_per_work, ms over gflops: the time of equal work;
    to_shared, that over the one of `shared`;
    gmacs and gmacs_slowest, multiply-adds of a step's forwards and backwards with the ancestry's, of a mean rank and
    of the rank that the others wait for; bytes that a rank gives to collectives in a step, by operation, sent_mb, their
    sum in MiB, and bytes_unused, those of gradients of parameters that no rank used; peak_mb, the largest over ranks;
    under ZeRO-3 also the most units and elements gathered at once, and the elements of the largest unit.

    UserError where rounds or steps are below 1.
    """
    bench = EngineSteps(config, join(config, rounds=rounds, steps=steps))
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for turn in range(rounds + 1):
        for policy in POLICIES:
            took = bench.timed(policy, range(turn * steps, (turn + 1) * steps))
            if turn:
                seconds[policy].append(took / steps)
    rows = [bench.row(policy, seconds[policy], range(steps, (rounds + 1) * steps)) for policy in POLICIES]
    for row in rows:
        row["to_shared"] = round(row["ms_per_work"] / rows[POLICIES.index("shared")]["ms_per_work"], 3)
    bench.end(out, rows)
    return rows


class EngineSteps:
    """Steps of stage finetune on the engine of a launch, with random weights and images that stay the same."""

    def __init__(self, config: RunConfig, workers: Workers):
        self.config, self.workers = config, workers
        self.train, self.space = config.finetune.train, space_of(config)
        meet = "micro_step" if self._exchanges_in_micro_steps else "step"
        self.samplers = {
            policy: PathSampler.from_config(with_policy(config, policy, self.train.accumulate, meet), self.space)
            for policy in POLICIES
        }
        pool, ancestry = finetune_models(config, workers)
        self.task = finetune_task(config, pool, ancestry, self.samplers["shared"])
        self.gathered = Gathered(pool, pool.ordered_modules)
        self.units = {name: _numel(pool.get_submodule(name)) for name in pool.ordered_modules}
        self.skippable = {name: _numel(pool.get_submodule(name)) for name in pool.skippable_modules}
        optimizer = build_optimizer(pool, self.train, skippable=pool.skippable_modules)
        self.trainer = Trainer(workers, self.task, optimizer, self.train, config.finetune.gradients)
        self.traffic = CommStats(self.trainer.module)
        images = self.train.batch_size // (workers.world * self.train.accumulate)
        self.batch = micro_batch(config, self.train, images, workers.device)

    def step(self, step: int) -> None:
        """One optimizer step."""
        take_step(self.trainer, repeat(self.batch), step)

    def timed(self, policy: str, steps: range) -> float:
        """Seconds of these steps, until all ranks have ended them."""
        self.task.sampler = self.samplers[policy]
        wait(self.workers)
        began = time.perf_counter()
        for step in steps:
            self.step(step)
        wait(self.workers)
        return time.perf_counter() - began

    def end(self, out: Path, rows: list[dict[str, Any]]) -> None:
        """Rank 0 writes the objects; all ranks leave."""
        self.trainer.close()
        leave(self.workers, out, rows)

    @property
    def _exchanges_in_micro_steps(self) -> bool:
        return self.workers.launch.zero_stage >= 2 and self.workers.engine.reduction == "all"

    def _gflops(self, step: int) -> list[list[float]]:
        """An image's forward on the paths of a step, by micro-step and rank."""
        plan = self.task.sampler.plan(step, self.workers.world)
        return [[self.space.cost(path).flops / 1e9 for path in row] for row in plan]

    def _work(self, step: int) -> float:
        return sum(map(sum, self._gflops(step))) / self.workers.world

    def _waited(self, step: int) -> float:
        """GFLOPs of forward and backward of an image on the paths that others wait for, in a step or micro-step."""
        rows = self._gflops(step)
        return TRAINING * (
            sum(map(max, rows)) if self._exchanges_in_micro_steps else max(map(sum, zip(*rows, strict=True)))
        )

    def _unused(self, step: int) -> int:
        plan = self.task.sampler.plan(step, self.workers.world)
        used = frozenset().union(*(self.task.module.modules_of(path) for row in plan for path in row))
        return sum(4 * size for name, size in self.skippable.items() if name not in used)

    def row(self, policy: str, seconds: list[float], steps: range) -> dict[str, Any]:
        """The object of one policy. steps: those that were timed."""
        self.task.sampler = self.samplers[policy]
        reset_peak(self.workers.device)
        with self.traffic.counting() as sent:
            for step in range(COUNTED):
                self.step(step)
        peak = self.workers.highest([peak_bytes(self.workers.device) / 2**20])[0]
        ms, work = 1000 * median(seconds), fmean(map(self._work, steps))
        launch, images = self.workers.launch, len(self.batch.images)
        teacher = (ancestry_forward(self.config) or 0.0) * self.train.accumulate / 1e9
        row = measured(self.config, self.workers) | {
            "policy": policy,
            "ms": round(ms, 2),
            "spread": spread(seconds),
            "gflops": round(work, 5),
            "ms_per_work": round(ms / work, 2),
            "gmacs": round(images * (TRAINING * work + teacher), 5),
            "gmacs_slowest": round(images * (fmean(map(self._waited, steps)) + teacher), 5),
            "bytes": {name: size // COUNTED for name, size in sorted(sent.items())},
            "sent_mb": round(sum(sent.values()) / COUNTED / 2**20, 2),
            "bytes_weights": 4 * sum(self.units.values()),
            "bytes_unused": round(fmean(map(self._unused, range(COUNTED)))),
            "peak_mb": round(peak, 1),
        }
        if launch.deepspeed and launch.zero_stage == 3:
            largest = max(self.units.values())
            row |= {"units": self.gathered.units, "elements": self.gathered.elements, "largest_unit": largest}
        return row | facts(self.workers.device)


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
