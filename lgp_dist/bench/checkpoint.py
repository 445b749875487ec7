"""What a checkpoint costs: how long training waits for it, how long until it is complete, and its bytes."""

import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lgp_dist.bench.common import facts, join, measured, spread, wait
from lgp_dist.bench.engine import EngineSteps
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.checkpointer import Checkpointer
from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.checkpoints.manifest import TrainState, read_manifest
from lgp_dist.errors import UserError

MODES = ("background", "wait")
"""Training goes on while a checkpoint is written, as in runs; or it waits until the checkpoint is complete."""
COLUMNS = (("engine", "mode", "step_ms", "stall_ms", "cost_ms", "publish_s", "bytes", "bytes_per_s", "share"),)


def bench_checkpoint(config: RunConfig, out: Path, rounds: int = 5, steps: int = 8) -> list[dict[str, Any]]:
    """Fine-tunes a recipe's pool on random images on the engine of this launch and saves it; rank 0 writes a list.

    In each round each mode takes `steps` steps without a save, then saves, and trains until the checkpoint is complete.
    Checkpoints are written next to `out`, on the disk to be measured, and removed at the end. Of each mode, medians
    over rounds:

    engine, ranks, parameters; bytes of all ranks' files; step_ms without a save; stall_ms in which no rank trains (for
    the copy, or for all of it), and first_stall_ms of the first save, which allocates buffers; steps_under_way, those
    taken during a save, and slower_ms, how much longer they took in sum than as many without; cost_ms, stall_ms +
    slower_ms, with cost_spread; publish_s until the checkpoint has its name, with publish_spread, and bytes_per_s over
    that time; every, the recipe's steps between two saves, and share, cost_ms over their time.

    UserError where rounds or steps are below 1, or the folder of checkpoints exists.
    """
    workers = join(config, rounds=rounds, steps=steps)
    folder = out.with_name(out.name + ".checkpoints")
    if workers.highest([folder.exists()])[0]:
        raise UserError(f"{folder} is there already: remove it, or choose another --out.")
    bench = EngineSteps(config, workers)
    saves = _Saves(bench, folder, steps)
    try:
        first = saves.save("background")
        timed = {mode: list[dict[str, float]]() for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                timed[mode].append(saves.save(mode))
        rows = [saves.row(mode, timed[mode], first) for mode in MODES]
    finally:
        workers.barrier()
        if workers.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    bench.end(out, rows)
    return rows


class _Saves:
    """Checkpoints of a bench's pool."""

    def __init__(self, bench: EngineSteps, folder: Path, steps: int):
        self.bench, self.steps, self.step = bench, steps, 0
        self.folder, self.engine = CheckpointDir(folder), bench.workers.launch.engine_name
        fragments = bench.trainer.fragments()
        self.checkpointer = Checkpointer(self.folder, bench.workers, fragments, bench.config.checkpoint)

    def save(self, mode: str) -> dict[str, float]:
        """Seconds of one save and of the steps around it."""
        quiet = median(self._train() for _ in range(self.steps))
        wait(self.bench.workers)
        began = time.perf_counter()
        self.checkpointer.save(self._state())
        if mode == "wait":
            self.checkpointer.wait()
        stall, under_way = time.perf_counter() - began, []
        while self.checkpointer.busy:
            under_way.append(self._train())
        published = time.perf_counter() - began
        slower = sum(under_way) - len(under_way) * quiet
        return {
            "step": quiet,
            "stall": stall,
            "steps_under_way": len(under_way),
            "slower": slower,
            "cost": stall + slower,
            "publish": published,
        }

    def _train(self) -> float:
        """Takes a step and, as the loop does, lets the checkpointer go on; seconds until all ranks have done it."""
        began = time.perf_counter()
        self.bench.step(self.step)
        self.step += 1
        wait(self.bench.workers)
        self.checkpointer.settle(int(self.bench.workers.highest([self.checkpointer.status])[0]))
        return time.perf_counter() - began

    def _state(self) -> TrainState:
        config, world = self.bench.config, self.bench.workers.world
        return TrainState("bench", self.step, self.step, config.seed, {}, {}, world, self.engine)

    def row(self, mode: str, timed: list[dict[str, float]], first: dict[str, float]) -> dict[str, Any]:
        """The object of one mode."""
        middle = {name: median(one[name] for one in timed) for name in timed[0]}
        newest = self.folder.final(self.folder.steps()[0])
        manifest, workers, every = read_manifest(newest), self.bench.workers, self.bench.config.checkpoint.every
        size = sum(size for size, _ in manifest.files.values())
        row = measured(self.bench.config, workers) | {
            "mode": mode,
            "parameters": sum(torch.Size(shape).numel() for shape in manifest.shapes.values()),
            "bytes": size,
            "step_ms": round(1000 * middle["step"], 2),
            "stall_ms": round(1000 * middle["stall"], 2),
            "first_stall_ms": round(1000 * first["stall"], 2),
            "steps_under_way": middle["steps_under_way"],
            "slower_ms": round(1000 * middle["slower"], 2),
            "cost_ms": round(1000 * middle["cost"], 2),
            "cost_spread": spread([one["cost"] for one in timed]),
            "publish_s": round(middle["publish"], 4),
            "publish_spread": spread([one["publish"] for one in timed]),
            "bytes_per_s": round(size / middle["publish"]),
            "every": every,
            "share": round(middle["cost"] / (every * middle["step"]), 6) if every else None,
        }
        return row | facts(workers.device)
