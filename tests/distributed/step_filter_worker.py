"""Run by `accelerate launch`: trains trials in which numbers go bad and notes after which steps nothing had moved.

Arguments: a JSON list of cases, and the output folder. Per case one JSON file per rank, and of rank 0 metrics and the
weights at the end: where the run stops, after one step more on the same engine.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from exact_trials import Trial
from exact_worker import workers_of
from safetensors.torch import save_file
from step_filter_cases import Case
from torch import Tensor, nn
from torch.optim import Optimizer

from lgp_dist.config.run_config import FaultConfig
from lgp_dist.engine import loop
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.step_filter import NotFinite, StepFilter
from lgp_dist.engine.trainer import Trainer
from lgp_dist.engine.workers import Workers
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.tasks.finetune import FinetuneTask


class Poison(torch.autograd.Function):
    """The identity, whose gradient is nan."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


class Faulty(FinetuneTask):
    """Goes wrong as its case says."""

    def __init__(self, case: Case):
        pool, ancestry, sampler = case.trial.build()
        super().__init__(pool, ancestry, sampler, case.trial.finetune_config())
        self.case, self.part, self.haunted = case, "", case.haunted
        for part in pool.skippable_modules:
            next(pool.get_submodule(part).parameters()).register_hook(self._hook(part))

    def _hook(self, part: str) -> Any:
        return lambda gradient: gradient * math.inf if part == self.part else gradient

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        found = super().losses(module, batch, context)
        last = context.micro_step + 1 == self.case.trial.accumulate
        kinds = {kind for step, kind, rank in self.case.faults if last and (step, rank) == (context.step, context.rank)}
        self.part = max(self.used(context)) if "part" in kinds else ""
        bad = "nan" in kinds or self.path(context).key in self.haunted
        loss = found["loss"] * (math.nan if bad else math.inf if "inf" in kinds else 1e3 if "spike" in kinds else 1.0)
        return {**found, "loss": Poison.apply(loss) if "gradient" in kinds else loss}


def state_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of all that a step may change on this rank: weights or partitions of them, moments and step counts."""
    weights = [
        getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()
    ]  # ZeRO-3 has parts alone
    weights += [tensor for group in optimizer.param_groups for tensor in group["params"]]
    found = {f"weight {place}": tensor.detach().clone() for place, tensor in enumerate(weights)}
    for place, state in enumerate(list(optimizer.state.values())):
        found |= {f"{name} {place}": value.clone() for name, value in state.items()}
    return found


def unmoved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether nothing changed, bit for bit; what the optimizer has made is zero."""
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    return same and not any(value.any() for name, value in after.items() if name not in before)


def run(case: Case, started: Workers, folder: Path, index: int) -> None:
    """Trains one case."""
    trial: Trial = case.trial
    workers = workers_of(trial, started)
    task, states, optimizers, trainers = Faulty(case), [], [], []

    def batches(start: int, steps: int) -> Iterator[Batch]:
        for step in range(start, start + steps):
            for micro in range(trial.accumulate):
                if not states:
                    states.append(state_of(task.module, optimizers[0]))
                yield trial.batch(step, micro, workers.rank)

    def keep(*arguments: Any) -> Optimizer:
        optimizers.append(build_optimizer(*arguments))
        return optimizers[0]

    def hold(*arguments: Any) -> Trainer:
        trainers.append(Trainer(*arguments))
        return trainers[0]

    def watch(module: nn.Module) -> dict[str, float]:
        states.append(state_of(task.module, optimizers[0]))
        return {}

    def describe(step: int, micro: int, rank: int) -> str:
        return f"keys of {step}/{micro}/{rank}"

    loop.build_optimizer, loop.Trainer = keep, hold
    (folder / str(index)).mkdir(exist_ok=True)
    faults = FaultConfig(case.skip_steps, case.spike)
    step_filter = StepFilter(task, workers, trial.accumulate, faults, "finetune", describe)
    facts: dict[str, Any] = {"sentence": "", "step": None}
    try:
        plan = loop.TrainingPlan(task, trial.train_config(), watch=watch, watch_every=1)
        setup = loop.RunSetup("finetune", batches, trial.steps, folder / str(index), step_filter=step_filter)
        loop.train(plan, setup, workers)
    except NotFinite as error:
        facts |= {"sentence": str(error), "step": error.step}
        states.append(state_of(task.module, optimizers[0]))
        task.haunted = frozenset()
        loop.take_step(trainers[0], batches(error.step + 1, 1), error.step + 1)
        trainers[0].close()
    facts["unmoved"] = [step for step in range(len(states) - 1) if unmoved(states[step], states[step + 1])]
    facts["steps"] = len(states) - 1
    (folder / f"{index}-{workers.rank}.json").write_text(json.dumps(facts))
    if workers.is_main:
        weights = {name: value.clone() for name, value in task.module.state_dict().items()}
        save_file(weights, folder / f"{index}.safetensors")


def main() -> None:
    cases = [Case.from_dict(fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    folder = Path(sys.argv[2])
    workers = Workers.start(cases[0].trial.engine_config())
    torch.set_num_threads(1)
    for index, case in enumerate(cases):
        workers.barrier()
        run(case, workers, folder, index)
    workers.barrier()
    workers.close()


if __name__ == "__main__":
    main()
