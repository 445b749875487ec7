"""The Python API: what scripts and notebooks may rely on. docs/api.md has an example of each name.

A finished run is opened with `open_run`; `train` trains a network of one's own with this project's engine.
"""

import importlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lgp_dist.commands.descendants import choose_of_run, export_of_run
from lgp_dist.commands.finished import FinishedRun, exporting
from lgp_dist.config.budget import Budget, parse_amount
from lgp_dist.config.run_config import EngineConfig, ExportConfig, Format, TrainConfig
from lgp_dist.engine.loop import RunSetup, TrainingPlan
from lgp_dist.engine.loop import train as train_plan
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError, nearest
from lgp_dist.export.choice import choose
from lgp_dist.files import beside, locked
from lgp_dist.models.build import build_pool
from lgp_dist.models.descendant import descendant_from_path
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.space import heads_of
from lgp_dist.protocols import Batch, ModuleStructure, StepContext
from lgp_dist.run.facts import Training
from lgp_dist.run.path_rows import PathRow, read_rows
from lgp_dist.run.tensors import load_tensors

__all__ = ["Batch", "EngineConfig", "OwnTask", "Run", "StepContext", "TrainConfig", "UserError", "open_run", "train"]


def open_run(folder: str | Path) -> "Run":
    """A run directory in which `lgp evaluate` is complete; UserError for any other."""
    return Run(FinishedRun.open(Path(folder)))


@dataclass(frozen=True)
class Run:
    """A finished run, as `open_run` opens it. Nothing here changes it, except that latencies are kept in it."""

    finished: FinishedRun

    def paths(self) -> list[PathRow]:
        """A dict for each evaluated path: key, params, flops (multiply-adds of an image), top1, top5 and more."""
        return read_rows(self.finished.evaluated.folder / "paths.json")

    def frame(self) -> Any:
        """The same as a pandas DataFrame; UserError where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError:
            raise UserError(
                "frame() needs pandas, which is not installed: `pip install pandas`, or use paths()."
            ) from None
        return pandas.DataFrame(self.paths())

    def best(
        self,
        max_params: float | str = 0,
        max_flops: float | str = 0,
        max_latency_ms: float = 0.0,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> PathRow:
        """The row of the most accurate path within all limits, as `lgp descend` chooses it; UserError if there is none.

        Limits of parameters and FLOPs are numbers, or texts such as "10M"; 0 for none. device: where latency is
        measured, if it is limited.
        """
        _check_among("device", device, ("cpu", "cuda"))
        params, flops = (parse_amount(str(limit)) for limit in (max_params, max_flops))
        budget = Budget(params, flops, max_latency_ms, device)
        run = FinishedRun.open(self.finished.root, budget=budget)
        if max_latency_ms:
            return choose_of_run(run, self.paths(), budget, plot=False)
        return choose(self.paths(), budget, "")

    def pool(self, device: str | torch.device = "cpu") -> LearngenePool:
        """The trained pool in eval mode: `pool(images, key)` gives a path's logits."""
        tuned = self.finished.directory.require("finetune")
        return build_pool(self.finished.config, torch.device(device), load_tensors(tuned.folder / "pool.safetensors"))

    def descendant(self, key: str) -> nn.Module:
        """A path as a model that owns its weights, in eval mode: timm's plain ViT, or a stitched one."""
        pool = self.pool()
        return descendant_from_path(pool, heads_of(self.finished.config), pool.space.by_key(key))

    def export(self, key: str, out: str | Path, formats: Sequence[Format] = (), images: int = 64) -> Path:
        """Writes a path as `lgp export` does, compared with the pool on validation images; the folder.

        formats: of pt2, onnx and int8, in addition to safetensors and plain torch.
        """
        for name in formats:
            _check_among("formats", name, get_args(Format))
        out = Path(out)
        run = exporting(self.finished.root, out, ExportConfig(path=key, formats=tuple(formats), images=images))
        with locked(beside(out), "out"):
            export_of_run(run, out, [])
        return out


def _check_among(argument: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{argument} has {value!r}: take {', '.join(known)}.")


@dataclass
class OwnTask:
    """A network of one's own and its loss, which `train` trains. Ranks may train different parts of it in a step."""

    module: nn.Module
    """Everything that is trained."""
    loss: Callable[[nn.Module, Batch, StepContext], Tensor]
    """(module as the engine wraps it, batch, place) -> scalar loss."""
    order: tuple[str, ...] = ()
    """Names of the submodules that every forward calls once, in this order; together they hold all parameters. Each
    takes a tensor as its first argument and returns one; where a forward does not need it, it returns its input. Empty
    where every forward runs everything."""
    skippable: tuple[str, ...] = ()
    """Names of those that a forward may skip."""
    uses: Callable[[StepContext], Collection[str]] = lambda context: ()
    """Place -> the skippable ones that its forward uses. Pure: every rank asks it for all ranks."""
    structure: ModuleStructure = field(init=False)
    """order and skippable, for the engine."""

    def __post_init__(self) -> None:
        self.structure, known = ModuleStructure(self.order, self.skippable), dict(self.module.named_modules())
        for name in (*self.order, *self.skippable):
            if name not in known:
                raise UserError(
                    f"The module has no submodule {name!r}: {nearest(name, known, 'name one that it has')}."
                )
        for name in self.skippable:
            if not f"{name}.".startswith(tuple(f"{part}." for part in self.order)):
                raise UserError(f"skippable names {name!r}, which no submodule of order holds: add the one that does.")
        if twice := [name for name in self.order if self.order.count(name) > 1]:
            raise UserError(f"order names {twice[0]!r} twice, but a forward calls each submodule once.")
        for name, _ in self.module.named_parameters() if self.order else ():
            if not name.startswith(tuple(f"{part}." for part in self.order)):
                raise UserError(f"Parameter {name} is in no submodule of order: add the one that holds it.")

    def used(self, context: StepContext) -> frozenset[str]:
        """For the engine; UserError where `uses` names what is not skippable."""
        found = frozenset(self.uses(context))
        if wrong := sorted(found - {*self.skippable}):
            raise UserError(f"uses returns {wrong[0]!r}, which skippable does not name: add it there, or correct it.")
        return found

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """For the engine."""
        return {"loss": self.loss(module, batch, context)}

    def labels(self, context: StepContext) -> dict[str, Any]:
        """Metrics name what each rank used."""
        return {"path": "+".join(sorted(self.uses(context)))} if self.skippable else {}

    def to(self, device: torch.device) -> None:
        """Does nothing: there is only the module."""


def train(
    task: OwnTask,
    batches: Callable[[StepContext], Batch],
    steps: int,
    out: str | Path,
    config: TrainConfig = TrainConfig(warmup_epochs=0.0),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(precision="fp32"),  # noqa: B008  frozen
) -> Training:
    """Trains `task.module` in place, on all ranks of the launch; afterwards every rank holds the same whole weights.

    batches: place -> the images of its micro-step, equally many everywhere. out: folder of metrics.jsonl. config:
    optimizer, learning rate and micro-steps; `steps` and `batches` take the place of epochs and batch_size. Without a
    launcher it is one process. It saves no checkpoints: that is for stages of a run.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}, but must be 1 or more.")
    workers = Workers.start(engine)
    rank, world, out = workers.rank, workers.world, Path(out)
    size = len(batches(StepContext(0, 0, rank, world)).images) * world * config.accumulate
    config = replace(config, epochs=1.0, max_steps=0, batch_size=size)

    def stream(start: int, count: int) -> Iterator[Batch]:
        for step in range(start, start + count):
            for micro in range(config.accumulate):
                yield batches(StepContext(step, micro, rank, world))

    out.mkdir(parents=True, exist_ok=True)
    facts = train_plan(TrainingPlan(task, config), RunSetup("train", stream, steps, out), workers)
    workers.barrier()
    workers.close()
    return facts
