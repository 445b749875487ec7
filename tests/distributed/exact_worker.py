"""Run by `accelerate launch`: trains trials with the project's loop and writes their weights.

Arguments: a JSON list of trials, and the output folder. Per trial one safetensors file and, where it is observed, one
JSON file with what every path gives on the wrapped module after the last step and what ZeRO-3 gathered on the way.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from exact_trials import Trial
from safetensors.torch import save_file
from torch import Tensor, nn

from lgp_dist.engine import trainer
from lgp_dist.engine.comm_stats import Gathered
from lgp_dist.engine.deepspeed_workarounds import gathered
from lgp_dist.engine.divergence_check import bits
from lgp_dist.engine.loop import Batches, RunSetup, TrainingPlan, train
from lgp_dist.engine.workers import Workers
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.run.facts import Training
from lgp_dist.tasks.finetune import FinetuneTask


class Watched(FinetuneTask):
    """Notes the units of which autograd keeps a gathered weight from forward to backward."""

    kept: frozenset[str] = frozenset()

    @cached_property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.module.named_parameters())

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(self._look, lambda tensor: tensor):
            return super().losses(module, batch, context)

    def _look(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        for name, weight in gathered(self.named).items():
            if weight.untyped_storage().data_ptr() == place:
                unit = next(unit for unit in self.structure.ordered_modules if name.startswith(unit + "."))
                self.kept |= {unit}
        return tensor


class Backwards(trainer.Gradients):
    """Gradients of a unit in the opposite order."""

    def __init__(self, module: Any, structure: Any, contract: str):
        super().__init__(module, structure, "chain")

    def _gates(self, gates: list[Any]) -> Any:
        return super()._gates(gates[::-1])


def workers_of(trial: Trial, started: Workers) -> Workers:
    """The processes of this launch under a trial's engine."""
    launch = started.launch
    if trial.engine != "ddp":
        launch = replace(launch, zero_stage=int(trial.engine[-1]))
    assert launch.deepspeed == (trial.engine != "ddp") and launch.world == trial.world
    return replace(started, launch=launch, engine=trial.engine_config())


def train_trial(
    task: Any, batches: Batches, trial: Any, workers: Workers, folder: Path, index: int, **more: Any
) -> Training:
    """The project's loop on a trial's settings. more: further fields of the plan."""
    plan = TrainingPlan(task, trial.train_config(), trial.finetune_config().gradients, **more)
    return train(plan, RunSetup(f"trial{index}", batches, trial.steps, folder), workers)


def run(trial: Trial, started: Workers, folder: Path, index: int) -> None:
    """Trains one trial; ranks compare their weights, rank 0 writes them."""
    workers = workers_of(trial, started)
    pool, ancestry, sampler = trial.build()
    if trial.broken == "schedule" and workers.rank:
        sampler = replace(sampler, seed=trial.seed + 1)
    contract_of, gradients = trainer.contract_of, trainer.Gradients
    if trial.broken == "contract":
        trainer.contract_of = lambda *_: "none"
    if trial.broken == "order" and workers.rank:
        trainer.Gradients = Backwards
    largest = max(sum(p.numel() for p in pool.get_submodule(name).parameters()) for name in pool.ordered_modules)
    held, answers = Gathered(pool, pool.ordered_modules if trial.observed else ()), []

    def batches(start: int, steps: int) -> Iterator[Batch]:
        for step in range(start, start + steps):
            if trial.broken == "weights" and workers.rank:
                pool.head.rows[1].head.bias.data[0] += 1e-3
            for micro in range(trial.accumulate):
                yield trial.batch(step, micro, workers.rank)

    def watch(module: nn.Module) -> dict[str, float]:
        images = trial.batch(trial.steps, 0, 0).images
        with torch.no_grad(), workers.autocast():
            found = {path.key: float(module(images, path).float().square().sum()) for path in pool.space.paths}
        answers.append(found)
        return found

    observer = {"watch": watch, "watch_every": trial.steps} if trial.observed else {}
    task = (Watched if trial.observed else FinetuneTask)(pool, ancestry, sampler, trial.finetune_config())
    done = train_trial(
        task,
        batches,
        trial,
        workers,
        folder,
        index,
        rates={part: rate for row, rate in enumerate(trial.row_lr) for part in pool.row_modules(row)},
        **observer,
    )
    trainer.contract_of, trainer.Gradients = contract_of, gradients
    assert done["steps"] == trial.steps
    state = {name: value.detach().clone() for name, value in pool.state_dict().items()}
    mine = torch.stack([bits(value) for value in state.values()])
    assert torch.equal(workers.sum(mine), mine * workers.world), f"{trial.name}: ranks end with different weights"
    if workers.is_main:
        save_file(state, folder / f"{index}.safetensors")
    if workers.is_main and isinstance(task, Watched):
        facts = {"answers": answers[-1], "units": held.units, "elements": held.elements, "largest": largest}
        (folder / f"{index}.json").write_text(json.dumps({**facts, "kept": sorted(task.kept)}))


def main() -> None:
    trials = [Trial(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    folder = Path(sys.argv[2])
    workers = Workers.start(trials[0].engine_config())
    torch.set_num_threads(1)
    for index, trial in enumerate(trials):
        run(trial, workers, folder, index)
    workers.barrier()
    workers.close()


if __name__ == "__main__":
    main()
