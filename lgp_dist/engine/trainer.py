"""One task on one engine: the only place that starts accelerate's wrapper and DeepSpeed.

A step is `begin`, then for each micro-step a forward of `module` and `backward`, then `finish`. `gradients`,
`optim.StepMask` and `deepspeed_config` keep it exact with another path on every rank; `divergence_check` watches it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim import Optimizer

from lgp_dist.config.run_config import EngineConfig, GradientConfig, TrainConfig
from lgp_dist.engine.deepspeed_config import deepspeed_config
from lgp_dist.engine.deepspeed_workarounds import drop_gradients, forget_gradients, make_whole, reduced_gradients
from lgp_dist.engine.divergence_check import DivergenceCheck
from lgp_dist.engine.fragments import Fragments
from lgp_dist.engine.gradients import Contract, Gradients
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.optim import EMA, StepMask
from lgp_dist.engine.step_filter import StepFilter, StepVerdict
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.protocols import StepContext, Task

Watch = Callable[[nn.Module], dict[str, float]]
"""Measures the wrapped module while it trains, with the same number of forwards on every rank."""


def contract_of(launch: Launch, engine: EngineConfig) -> Contract:
    """Returns the contract that keeps this engine exact (engine/gradients.py)."""
    if not launch.deepspeed:
        return "gates" if launch.world > 1 else "none"
    if launch.zero_stage == 3:
        return "leaves"
    return "none" if launch.zero_stage == 0 or engine.reduction == "union" else "chain"


def prepare_module(module: Any, workers: Workers) -> None:
    """Makes a task's module compute as the recipe's `engine` says: recomputed activations, compiled blocks, autocast.

    UserError where the module has no method `set_grad_checkpointing` that the recipe asks for.
    """
    engine = workers.engine
    recompute, can = engine.activation_checkpointing, hasattr(module, "set_grad_checkpointing")
    if can:
        module.set_grad_checkpointing(recompute == "on" or recompute == "auto" and workers.launch.zero_stage == 3)
    elif recompute == "on":
        raise UserError(
            f"engine.activation_checkpointing is on, but {type(module).__name__} has no method set_grad_checkpointing: "
            "give it one, or choose off."
        )
    for block in module.modules():
        if engine.compile and isinstance(block, Block):
            block.compile(backend=engine.compile, dynamic=False)
    if engine.precision != "fp32":
        # Inside the module, since DeepSpeed's engine switches off an autocast around its own forward.
        module.forward = workers.autocast()(module.forward)


def restore_module(module: Any) -> None:
    """Undoes `prepare_module`."""
    for block in module.modules():
        block._compiled_call_impl = None
    if hasattr(module, "set_grad_checkpointing"):
        module.set_grad_checkpointing(False)
    vars(module).pop("forward", None)


class LossScale:
    """fp16's loss scale by the rule of torch's GradScaler, which cannot see an overflow in another rank's partition."""

    def __init__(self, start: float):
        self.value, self.good = start, 0

    def update(self, overflow: bool) -> None:
        """Halves the scale after an overflow; doubles it after 2,000 consecutive steps without one."""
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.value /= 2
        elif self.good % 2000 == 0:
            self.value *= 2


class Trainer:
    """Module and optimizer of a task, wrapped for these workers until `close`."""

    def __init__(
        self,
        workers: Workers,
        task: Task,
        optimizer: Optimizer,
        train: TrainConfig,
        rules: GradientConfig,
        step_filter: StepFilter | None = None,
    ):
        self.workers, self.task, self.optimizer, self.train, self.rules = workers, task, optimizer, train, rules
        launch, engine = workers.launch, workers.engine
        self.deepspeed, self.stage, self.union = launch.deepspeed, launch.zero_stage, engine.reduction == "union"
        self.partitioned = self.deepspeed and self.stage > 0
        self.gradients = Gradients(task.module, task.structure, contract_of(launch, engine))
        self.factors: dict[str, float] = {}
        if rules.average == "users":
            self.gradients.weigh(self.factors)
        self.divergence_check = None
        if engine.audit and workers.world > 1:
            ordered = self.deepspeed and self.stage in (1, 2) and not self.union
            self.divergence_check = DivergenceCheck(task.module, task.structure, workers, gradients=ordered)
        self.step_mask = StepMask(optimizer)
        self.step_filter = step_filter or StepFilter(task, workers, train.accumulate)
        self.losses: list[Tensor] = []
        self.scaler = LossScale(engine.fp16_scale) if engine.precision == "fp16" else None
        self.schedule: list[frozenset[str]] = []
        prepare_module(task.module, workers)
        self.accelerator = self._accelerator()
        self.module: Any = self._wrapped(task.module)
        self._open = contextlib.ExitStack()

    def _wrapped(self, module: nn.Module) -> nn.Module:
        """DeepSpeed's engine, DDP, or the module itself for one process without DeepSpeed."""
        if self.deepspeed:
            return self.accelerator.prepare(module, self.optimizer)[0]
        return self.accelerator.prepare(module) if self.workers.world > 1 else module.to(self.workers.device)

    def _accelerator(self) -> Accelerator:
        AcceleratorState._reset_state()  # each stage has a DeepSpeed configuration of its own; the group stays
        plugin, workers = None, self.workers
        if self.deepspeed:
            # The launch file's fields were read and checked; accelerate refuses them together with a configuration.
            os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
            per_rank, file = self.train.batch_size // (workers.world * self.train.accumulate), workers.launch.file
            config = deepspeed_config(self.stage, workers.world, workers.engine, self.train, per_rank, file)
            plugin = DeepSpeedPlugin(hf_ds_config=config)
        return Accelerator(
            cpu=not self.deepspeed and workers.device.type == "cpu",
            mixed_precision="no",
            deepspeed_plugin=plugin,
        )

    def begin(self, step: int) -> None:
        """Begins a step: computes which modules each rank and micro-step will use."""
        workers, count = self.workers, self.train.accumulate
        contexts = [StepContext(step, m, rank, workers.world) for m in range(count) for rank in range(workers.world)]
        self.schedule = [self.task.used(context) for context in contexts]
        union = frozenset().union(*self.schedule)
        self.step_mask.active = union if self.rules.unused == "skip" else None
        self.losses.clear()
        self.factors.clear()
        if self.rules.average == "users":
            uses = {name: sum(name in used for used in self.schedule) for name in union}
            self.factors.update({name: len(contexts) / number for name, number in uses.items()})
        if self.scaler is not None and self.partitioned:
            self.module.optimizer.override_loss_scale(self.scaler.value)
        if self.union:
            self.module.set_gradient_accumulation_boundary(True)
            self._open.enter_context(self.module.coalesce_grad_reduction())

    def context(self, step: int, micro: int) -> StepContext:
        """Returns the context of this rank's micro-step."""
        return StepContext(step, micro, self.workers.rank, self.workers.world)

    @contextlib.contextmanager
    def micro_step(self, step: int, micro: int) -> Iterator[StepContext]:
        """A context for forward and backward of a micro-step; yields its StepContext."""
        context = self.context(step, micro)
        self.gradients.used = self.task.used(context)
        last = micro + 1 == self.train.accumulate
        if self.deepspeed:
            if not self.union:
                self.module.set_gradient_accumulation_boundary(last)
            yield context
        else:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                yield context

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-step's loss, divided by the number of micro-steps."""
        self.losses.append(loss.detach())
        if self.scaler is not None and not self.partitioned:  # ZeRO-1 to 3 scale the loss themselves
            loss = loss * self.scaler.value
        if self.deepspeed:
            self.module.backward(loss)
        else:
            (loss / self.train.accumulate).backward()

    def finish(self, step: int) -> StepVerdict:
        """Checks, clips and steps, or skips the step; NotFinite after more bad steps than the step filter allows."""
        if self.union:
            self.gradients.fill(frozenset().union(*self.schedule))
            self._open.close()
        if self.divergence_check is not None:
            self.divergence_check.check(step, self.schedule)
        gradients = reduced_gradients(self.module) if self.partitioned else self._whole_gradients()
        scaled = self.scaler is not None and self.scaler.value > 1
        # Without partitions every rank holds the whole gradient; with them, one that fp16's loss scale multiplies.
        unit = (1 / self.scaler.value if self.scaler else 1.0) if self.partitioned else self.workers.world**-0.5
        judged = self.step_filter.judge(step, self.losses, gradients, scaled)
        verdict = replace(judged, grad_norm=unit * judged.grad_norm)
        self.step_mask.skip_all = verdict.skipped
        if self.partitioned and verdict.skipped:
            drop_gradients(self.module)
        self._step()
        if self.partitioned:
            forget_gradients(self.module)
        if self.scaler is not None:
            self.scaler.update(verdict.overflow)
        if verdict.stop is not None:
            raise verdict.stop
        every = self.workers.engine.audit_weights_every
        if self.divergence_check is not None and every and self.stage < 3 and (step == 0 or (step + 1) % every == 0):
            self.divergence_check.check_weights(step)
        return verdict

    def _whole_gradients(self) -> list[tuple[str, Tensor]]:
        """Every gradient with its skippable module, where ranks hold them whole, without fp16's loss scale."""
        found = self.gradients.fill()
        if self.scaler is not None:
            torch._foreach_div_([gradient for _, gradient in found], self.scaler.value)
        return found

    def _step(self) -> None:
        """Clips and steps."""
        if self.deepspeed:
            self.module.step()
            return
        if self.train.clip_grad:
            nn.utils.clip_grad_norm_((tensor for _, tensor, _ in self.gradients.parameters), self.train.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fragments(self) -> Fragments:
        """Returns what this rank holds of weights and optimizer state."""
        engine = self.module if self.partitioned else None
        return Fragments(self.task.module, self.optimizer, engine, self.workers.rank, self.workers.world)

    def measure(self, watch: Watch) -> dict[str, float]:
        """Returns what `watch` measures of the module in eval mode."""
        self.module.eval()
        measured = watch(self.module)
        self.module.train()
        return measured

    def averaged_weights(self) -> dict[str, Tensor]:
        """Returns the moving average of every weight by name, whole on every rank."""
        fragments = self.fragments()
        whole = {name: torch.zeros(shape, device=self.workers.device) for name, shape in fragments.shapes.items()}
        for part in fragments.written():  # every element is on one rank
            if part.kind == EMA:
                whole[part.parameter].view(-1)[part.start : part.start + part.values.numel()] = part.values
        return {name: self.workers.sum(average) for name, average in whole.items()}

    def close(self) -> None:
        """Ends the engine, and leaves a plain module with whole weights. The process group stays."""
        if self.deepspeed and self.stage == 3:
            make_whole(self.task.module)
        self.accelerator.free_memory()
        self.gradients.close()
        self.step_mask.close()
        if self.divergence_check is not None:
            self.divergence_check.close()
        restore_module(self.task.module)
