"""A training step on this device: paths on eager, compiled and fused blocks, and several paths for one forward of the
ancestry."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lgp_dist.bench.common import (
    DTYPES,
    ceilings,
    facts,
    interleaved,
    micro_batch,
    one_process,
    random_ancestry,
    random_pool,
    spread,
)
from lgp_dist.config.run_config import Ops, Precision, RunConfig
from lgp_dist.engine.trainer import prepare_module
from lgp_dist.engine.workers import Workers, choose_attention
from lgp_dist.models.build import prepare_ancestry
from lgp_dist.paths.path import Path, Space
from lgp_dist.paths.space import space_of
from lgp_dist.tasks.losses import soft_cross_entropy

WAYS: dict[str, tuple[Ops, bool]] = {
    "eager": ("reference", False),
    "compiled": ("reference", True),
    "fused": ("fused", False),
    "fused+compiled": ("fused", True),
}
"""How blocks are computed: `engine.ops`, and whether `engine.compile` is on."""
SHARED = (1, 2, 4)
"""Paths for one forward of the ancestry."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
LIMITS = {"fp32": 1e-5, "bf16": 5e-2}
"""Largest relative distance of a path's logits from eager ones in fp32."""
COLUMNS = {
    "path": ("path", "precision", "way", "batch", "ms", "spread", "tflops", "of_peak", "to_eager", "to_compiled"),
    "step": ("precision", "way", "batch", "paths", "ms_per_path", "ancestry_ms", "spread", "to_one"),
}


def bench_step(config: RunConfig, batch: int = 0, repeats: int = 5, compiled: bool = True) -> list[dict[str, Any]]:
    """Objects of `kind` path and of `kind` step, for each precision; what is compared takes turns.

    path: forward and backward of one path in one way: ms; tflops (three forwards); of_peak, its share of the fastest
    product seen; to_eager and to_compiled, how many times as fast it is as those. step: one forward of the ancestry and
    `paths` paths of the eager pool that share it, in way plain (weights are cast in every forward), prepared (cast
    once) or compiled: ms_per_path; ancestry_ms; to_one, how many times as fast, per path, as one path with a plain
    ancestry. spread: (most - least) / median.

    Models are those that stage finetune trains under these settings, with random weights and images. batch: images; 0
    for the recipe's in a micro-step. compiled: also with torch.compile, by the backend of `engine.compile`, or inductor
    if it is empty. Raises ArithmeticError where a way's logits differ from eager ones.
    """
    workers = one_process(config, batch, repeats)
    bench, rows = _Bench(config, workers, batch), []
    for precision in PRECISIONS:
        choose_attention(workers.device.type, precision)
        peak, _ = ceilings(workers.device, DTYPES[precision])
        for path in _chosen(bench.space):
            rows += bench.path_rows(path, precision, repeats, peak, compiled)
        rows += bench.step_rows(precision, repeats, compiled)
    workers.close()
    return [row | facts(workers.device) for row in rows]


def _chosen(space: Space) -> list[Path]:
    """Both rows alone, and the first stitched paths with one, two and half of the wide row's blocks."""
    stitched = [path for path in space.paths if not path.is_row and path.last_row == len(space.widths) - 1]

    def wide(path: Path) -> int:
        return path.segments[-1].stop - path.segments[-1].start

    counts = (1, 2, max(space.depths) // 2)
    some = [next((path for path in stitched if wide(path) == count), None) for count in counts]
    return list(dict.fromkeys([space.paths[0], *(path for path in some if path), space.paths[len(space.widths) - 1]]))


class _Bench:
    """Models and images of a recipe on a device."""

    def __init__(self, config: RunConfig, workers: Workers, batch: int):
        self.config, self.workers, self.space = config, workers, space_of(config)
        self.backend = config.engine.compile or "inductor"
        torch.manual_seed(config.seed)
        self.data = micro_batch(config, config.finetune.train, batch, workers.device)

    def changed(self, precision: Precision, ops: Ops = "reference", backend: str = "") -> tuple[RunConfig, Workers]:
        """The recipe and its workers with another precision and way of computing."""
        engine = replace(self.config.engine, precision=precision, ops=ops, compile=backend)
        return replace(self.config, engine=engine), replace(self.workers, engine=engine)

    def pool(self, way: str, precision: Precision) -> nn.Module:
        """The pool as the engine trains it in one way, with the same random weights for every way."""
        ops, compiled = WAYS[way]
        config, workers = self.changed(precision, ops, self.backend if compiled else "")
        pool = random_pool(config, workers, training=True)
        prepare_module(pool, workers)
        return pool

    def path_rows(
        self, path: Path, precision: Precision, repeats: int, peak: float, compiled: bool
    ) -> list[dict[str, Any]]:
        """One path in every way, after a check of its logits."""
        torch.compiler.reset()
        calls: dict[str, Callable[[], Any]] = {}
        for way in [way for way, (_, compiles) in WAYS.items() if compiled or not compiles]:
            pool = self.pool(way, precision)
            self._check(pool, path, precision, way)
            calls[way] = partial(self._train, pool, path, precision)
        seconds = interleaved(calls, self.workers.device, repeats)
        middle = {way: median(values) for way, values in seconds.items()}
        flops = 6.0 * len(self.data.images) * self.space.cost(path).flops  # multiply and add; backward is two forwards
        about = {"kind": "path", "path": path.key, "precision": precision, "batch": len(self.data.images)}
        return [
            about
            | {
                "way": way,
                "ms": round(1e3 * mine, 4),
                "spread": spread(seconds[way]),
                "tflops": round(flops / mine / 1e12, 4),
                "of_peak": round(flops / mine / peak, 3),
                "to_eager": round(middle["eager"] / mine, 3),
                "to_compiled": round(middle["compiled"] / mine, 3) if compiled else None,
            }
            for way, mine in middle.items()
        ]

    def _check(self, pool: nn.Module, path: Path, precision: Precision, way: str) -> None:
        config, workers = self.changed("fp32")
        with torch.no_grad():
            wanted = random_pool(config, workers, training=False)(self.data.images, path)
            found = pool(self.data.images, path).float()
        distance = float((found - wanted).norm() / wanted.norm())
        if not distance <= LIMITS[precision]:
            raise ArithmeticError(f"{way} {precision} {path.key} is {distance:.1e} from eager, above its limit")

    def _train(self, pool: nn.Module, path: Path, precision: Precision, kept: list[Tensor] | None = None) -> None:
        """Forward and backward of one path. kept: the ancestry's logits, if it teaches."""
        with self.changed(precision)[1].autocast():
            logits = pool(self.data.images, path).float()
        loss = cross_entropy(logits, self.data.targets)
        if kept:
            loss = loss + soft_cross_entropy(kept[0], logits, 1.0, "sample")
        loss.backward()
        pool.zero_grad(set_to_none=True)

    def step_rows(self, precision: Precision, repeats: int, compiled: bool) -> list[dict[str, Any]]:
        """Several paths after one forward of the ancestry, plain, prepared and compiled."""
        torch.compiler.reset()
        pool, chosen = self.pool("eager", precision), _chosen(self.space)
        calls: dict[str, Callable[[], Any]] = {}
        for name in ("plain", "prepared", "compiled") if compiled else ("plain", "prepared"):
            config, workers = self.changed(precision, backend=self.backend if name == "compiled" else "")
            ancestry = random_ancestry(config, workers)
            if name != "plain":
                prepare_ancestry(ancestry, config, "finetune")
            calls[f"{name} 0"] = partial(self._teach, ancestry, workers)
            for count in SHARED:
                calls[f"{name} {count}"] = self._step(pool, chosen, calls[f"{name} 0"], precision, count)
        seconds = interleaved(calls, self.workers.device, repeats)
        middle = {key: median(values) for key, values in seconds.items()}
        rows = []
        for key, values in seconds.items():
            name, count = key.split()
            if count == "0":
                continue
            mine = middle[key] / int(count) / len(chosen)
            rows.append(
                {"kind": "step", "precision": precision, "batch": len(self.data.images), "way": name}
                | {"paths": int(count), "ms_per_path": round(1e3 * mine, 4), "spread": spread(values)}
                | {"ancestry_ms": round(1e3 * middle[f"{name} 0"], 4)}
                | {"to_one": round(middle["plain 1"] / len(chosen) / mine, 3)}
            )
        return rows

    def _teach(self, ancestry: nn.Module, workers: Workers) -> Tensor:
        with workers.autocast():
            return ancestry(self.data.images)[0]

    def _step(
        self, pool: nn.Module, chosen: list[Path], teach: Callable[[], Tensor], precision: Precision, count: int
    ) -> Callable[[], None]:
        """Every chosen path `count` times, with a forward of the ancestry before each `count` of them."""

        def call() -> None:
            kept: list[Tensor] = []
            for place, path in enumerate(chosen * count):
                if place % count == 0:
                    kept = [teach()]
                self._train(pool, path, precision, kept)

        return call
