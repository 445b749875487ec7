"""A training step on this device: paths on timm's, compiled and fused blocks, and what the ancestry costs beside."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lgp_dist.bench.common import as_table, ceilings, check_least, chosen_device, facts, in_turns, spread
from lgp_dist.config.run_config import Ops, Precision, RunConfig
from lgp_dist.engine.workers import autocast, choose_attention
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.build import ancestry_vit
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.path import Path
from lgp_dist.paths.space import heads_of
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.run.checks import check_config
from lgp_dist.tasks.losses import soft_cross_entropy

WAYS: dict[str, tuple[Ops, bool]] = {
    "eager": ("reference", False),
    "compiled": ("reference", True),
    "fused": ("fused", False),
    "fused+compiled": ("fused", True),
}
"""How blocks are computed: operations, and whether each block goes through torch.compile."""
SHARED = (1, 2, 4)
"""Paths for one forward of the ancestry."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1e-5, "bf16": 5e-2}
"""How far, relative, a path's logits may be from eager ones in fp32."""


def bench_step(config: RunConfig, batch: int = 0, repeats: int = 5, compiled: bool = True) -> list[dict[str, Any]]:
    """Objects of `kind` path and of `kind` step, for each precision; what is compared takes turns.

    path: forward and backward of one path (path, way): ms, tflops (3 x forward), of_peak (share of the fastest product
    seen), to_eager, to_compiled (how often as fast as those). step: the ancestry's forward and `paths` paths that share
    it, way `plain` (weights cast in every forward) or `prepared`: ms_per_path, ancestry_ms, to_one (how often as fast,
    per path, as one path and a plain ancestry). spread: (most - least) / median. Weights and images are random. batch:
    images; 0 for the recipe's in a micro-step. compiled: also what torch.compile makes. Raises ArithmeticError where a
    way's logits are not eager's.
    """
    check_config(config)
    for option, value, least in (("--batch", batch, 0), ("--repeats", repeats, 1)):
        check_least(option, value, least)
    device, space = chosen_device(config.engine.device, "--engine.device"), PathSpace.from_config(config)
    bench, rows = _Bench(config, space, device, batch), []
    for precision in PRECISIONS:
        choose_attention(device.type, precision)
        peak, _ = ceilings(device, DTYPES[precision])
        for path in _chosen(space):
            rows += bench.paths(path, precision, repeats, peak, compiled)
        rows += bench.steps(precision, repeats, "inductor" if compiled else "")
    return [row | facts(device) for row in rows]


def _chosen(space: PathSpace) -> list[Path]:
    """Both rows alone, and the first stitched paths with one wide block and with half of them."""
    stitched = [path for path in space.paths if path.stitch is not None and path.last_row == len(space.widths) - 1]

    def wide(path: Path) -> int:
        return path.segments[-1].stop - path.segments[-1].start

    some = [next((path for path in stitched if wide(path) == count), None) for count in (1, 2, space.depth // 2)]
    found = [space.paths[0], *(path for path in some if path), space.paths[len(space.widths) - 1]]
    return list(dict.fromkeys(found))


class _Bench:
    """Models and images of a recipe on a device."""

    def __init__(self, config: RunConfig, space: PathSpace, device: torch.device, batch: int):
        self.config, self.space, self.device = config, space, device
        train = config.finetune.train
        self.batch = batch or max(1, train.batch_size // train.accumulate)
        torch.manual_seed(config.seed)
        self.images = torch.randn(self.batch, space.channels, space.image_size, space.image_size, device=device)
        self.targets = torch.randint(space.num_classes, (self.batch,), device=device)

    def pool(self, way: str) -> LearngenePool:
        """The pool with the same random weights for every way."""
        torch.manual_seed(self.config.seed)
        pool = LearngenePool.empty(self.space, heads_of(self.config)).to(self.device)
        ops, compiled = WAYS[way]
        pool.set_ops(ops)
        for unit in pool.units.values() if compiled else ():
            if hasattr(unit, "block"):
                unit.block.compile(dynamic=False)
        return pool.train()

    def paths(
        self, path: Path, precision: Precision, repeats: int, peak: float, compiled: bool
    ) -> list[dict[str, Any]]:
        """One path, every way, after a look at its logits."""
        torch.compiler.reset()
        calls: dict[str, Callable[[], Any]] = {}
        for way in [way for way, (_, compiles) in WAYS.items() if compiled or not compiles]:
            pool = self.pool(way)
            self._check(pool, path, precision, way)
            calls[way] = self._trained(pool, path, precision)
        seconds = in_turns(calls, self.device, repeats)
        middle = {way: median(values) for way, values in seconds.items()}
        flops = 6.0 * self.batch * self.space.cost(path).flops  # multiply and add; backward is two forwards
        about = {"kind": "path", "path": path.key, "precision": precision, "batch": self.batch}
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

    def _check(self, pool: LearngenePool, path: Path, precision: Precision, way: str) -> None:
        with torch.no_grad():
            wanted = self.pool("eager")(self.images, path)
            with autocast(self.device.type, precision):
                found = pool(self.images, path).float()
        distance = float((found - wanted).norm() / wanted.norm())
        if not distance <= LIMITS[precision]:
            raise ArithmeticError(f"{way} {precision} {path.key} is {distance:.1e} from eager, above its limit")

    def _trained(
        self, pool: nn.Module, path: Path, precision: Precision, target: Callable[[], Tensor | None] = lambda: None
    ) -> Callable[[], None]:
        """Forward and backward of one path; target: logits of the ancestry, if any."""

        def call() -> None:
            soft = target()
            with autocast(self.device.type, precision):
                logits = pool(self.images, path).float()
            loss = cross_entropy(logits, self.targets)
            if soft is not None:
                loss = loss + soft_cross_entropy(soft, logits, 1.0, "sample")
            loss.backward()
            pool.zero_grad(set_to_none=True)

        return call

    def steps(self, precision: Precision, repeats: int, backend: str) -> list[dict[str, Any]]:
        """Several paths after one forward of the ancestry, plain and prepared."""
        torch.compiler.reset()
        pool, chosen = self.pool("eager"), _chosen(self.space)
        calls: dict[str, Callable[[], Any]] = {}
        for name in ("plain", "prepared", "compiled") if backend else ("plain", "prepared"):
            ancestry = Ancestry(ancestry_vit(self.config)).to(self.device)
            if name != "plain":
                ancestry.prepare(precision, backend if name == "compiled" else "")
            calls[f"{name} 0"] = self._ancestry(ancestry, precision)
            for count in SHARED:
                calls[f"{name} {count}"] = self._step(pool, chosen, calls[f"{name} 0"], precision, count)
        seconds = in_turns(calls, self.device, repeats)
        middle = {key: median(values) for key, values in seconds.items()}
        about = {"kind": "step", "precision": precision, "batch": self.batch}
        rows = []
        for key, values in seconds.items():
            name, count = key.split()
            if count == "0":
                continue
            mine = middle[key] / int(count) / len(chosen)
            rows.append(
                about
                | {"way": name, "paths": int(count), "ms_per_path": round(1e3 * mine, 4), "spread": spread(values)}
                | {"ancestry_ms": round(1e3 * middle[f"{name} 0"], 4)}
                | {"to_one": round(middle["plain 1"] / len(chosen) / mine, 3)}
            )
        return rows

    def _ancestry(self, ancestry: Ancestry, precision: Precision) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with autocast(self.device.type, precision):
                return ancestry(self.images)[0]

        return call

    def _step(
        self, pool: nn.Module, chosen: list[Path], ancestry: Callable[[], Tensor], precision: Precision, count: int
    ) -> Callable[[], None]:
        """Every chosen path `count` times, with a forward of the ancestry before each `count` of them."""
        kept: list[Tensor] = []
        work = [self._trained(pool, path, precision, lambda: kept[0]) for path in chosen] * count

        def call() -> None:
            for place, one in enumerate(work):
                if place % count == 0:
                    kept[:] = [ancestry()]
                one()

        return call


def step_table(rows: list[dict[str, Any]]) -> str:
    """The same as lines of text."""
    paths, steps = ([row for row in rows if row["kind"] == kind] for kind in ("path", "step"))
    names = ("path", "precision", "batch", "way", "ms", "spread", "tflops", "of_peak", "to_eager", "to_compiled")
    more = ("precision", "batch", "way", "paths", "ms_per_path", "ancestry_ms", "spread", "to_one")
    return as_table(paths, names) + "\n\n" + as_table(steps, more)
