"""What a checkpoint costs: how long it holds up training, how long it takes to be there, and its bytes."""

import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lgp_dist.bench.common import facts, join, spread
from lgp_dist.bench.engine import Bench
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.checkpointer import Checkpointer
from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.checkpoints.manifest import Manifest, TrainState, read_manifest
from lgp_dist.errors import UserError

MODES = ("background", "wait")
"""Training goes on while a checkpoint is written, as runs do it; or it waits until it is there."""


def bench_checkpoint(config: RunConfig, out: Path, rounds: int = 5, steps: int = 8) -> list[dict[str, Any]]:
    """Fine-tunes a recipe's pool on random images on the engine of this launch and saves it; rank 0 writes a list.

    In each round both modes take a turn: `steps` steps without a save, then a save and steps until it has its name.
    Checkpoints lie beside `out`, on the disk that is measured, and are removed at the end. One object for each mode:
    engine, ranks, parameters, bytes (of all ranks' files), step_ms (without a save), stall_ms (in which no rank
    trains: for the copy, or for all of it), steps_under_way and slower_ms (steps while a save is under way, and how
    much longer they took in sum than as many without), cost_ms (both together), publish_s (until it has its name),
    bytes_per_s (over that time), every, and share (cost_ms over the step time between two saves of the recipe); medians
    over rounds, with cost_spread and publish_spread ((most - least) / median). first_stall_ms is of the first save,
    which makes its buffers, in either mode. UserError where rounds or steps are below 1, or there is such a folder.
    """
    workers = join(config, rounds=rounds, steps=steps)
    folder = out.with_name(out.name + ".checkpoints")
    if workers.highest([folder.exists()])[0]:
        raise UserError(f"{folder} is there already: remove it, or choose another --out.")
    bench = Bench(config, workers)
    saves = _Saves(bench, folder, steps)
    try:
        first = saves.turn("background")
        turns = {mode: list[dict[str, float]]() for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                turns[mode].append(saves.turn(mode))
        rows = [saves.row(mode, turns[mode], first) for mode in MODES]
    finally:
        workers.barrier()
        if workers.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    bench.end(out, rows)
    return rows


class _Saves:
    """Checkpoints of a bench's pool."""

    def __init__(self, bench: Bench, folder: Path, steps: int):
        self.bench, self.steps, self.step = bench, steps, 0
        workers = bench.workers
        self.checkpoint_dir = CheckpointDir(folder)
        self.saves = Checkpointer(self.checkpoint_dir, workers, bench.trainer.fragments(), bench.config.checkpoint)
        self.engine = workers.launch.engine_name

    def turn(self, mode: str) -> dict[str, float]:
        """Seconds of one save and of the steps around it, in a fresh folder."""
        quiet = median(self._train() for _ in range(self.steps))
        self.bench.wait()
        began = time.perf_counter()
        self.saves.save(self._state())
        if mode == "wait":
            self.saves.wait()
        stall, under_way = time.perf_counter() - began, []
        while self.saves.busy:
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
        """One step and, as in the loop, its pulse; seconds until all ranks have done it."""
        began = time.perf_counter()
        self.bench.step(self.step)
        self.step += 1
        self.bench.wait()
        self.saves.settle(int(self.bench.workers.highest([self.saves.status])[0]))
        return time.perf_counter() - began

    def _state(self) -> TrainState:
        config, world = self.bench.config, self.bench.workers.world
        return TrainState("bench", self.step, self.step, config.seed, {}, {}, world, self.engine)

    def _newest(self) -> Manifest:
        return read_manifest(self.checkpoint_dir.final(self.checkpoint_dir.steps()[0]))

    def row(self, mode: str, turns: list[dict[str, float]], first: dict[str, float]) -> dict[str, Any]:
        """The object of one mode."""
        middle = {name: median(turn[name] for turn in turns) for name in turns[0]}
        manifest, workers, every = self._newest(), self.bench.workers, self.bench.config.checkpoint.every
        size = sum(size for size, _ in manifest.files.values())
        row = {
            "recipe": self.bench.config.recipe,
            "engine": self.engine,
            "mode": mode,
            "ranks": workers.world,
            "widths": list(self.bench.space.widths),
            "parameters": sum(torch.Size(shape).numel() for shape in manifest.shapes.values()),
            "images": self.bench.train.batch_size,
            "bytes": size,
            "step_ms": round(1000 * middle["step"], 2),
            "stall_ms": round(1000 * middle["stall"], 2),
            "first_stall_ms": round(1000 * first["stall"], 2),
            "steps_under_way": middle["steps_under_way"],
            "slower_ms": round(1000 * middle["slower"], 2),
            "cost_ms": round(1000 * middle["cost"], 2),
            "cost_spread": spread([turn["cost"] for turn in turns]),
            "publish_s": round(middle["publish"], 4),
            "publish_spread": spread([turn["publish"] for turn in turns]),
            "bytes_per_s": round(size / middle["publish"]),
            "every": every,
            "share": round(middle["cost"] / (every * middle["step"]), 6) if every else None,
        }
        return row | facts(workers.device)


def checkpoint_table(rows: list[dict[str, Any]]) -> str:
    """The objects of `bench_checkpoint` as text."""
    head = (
        f"{'engine':<9}{'mode':<13}{'step ms':>9}{'stall ms':>10}{'cost ms':>10}{'published s':>13}{'MB':>9}{'MB/s':>8}"
    )
    lines = [f"{head}{'share':>9}"]
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.2%}"
        lines.append(
            f"{row['engine']:<9}{row['mode']:<13}{row['step_ms']:>9.1f}{row['stall_ms']:>10.1f}{row['cost_ms']:>10.1f}"
            f"{row['publish_s']:>13.2f}{row['bytes'] / 1e6:>9.1f}{row['bytes_per_s'] / 1e6:>8.0f}{share:>9}"
        )
    return "\n".join(lines)
