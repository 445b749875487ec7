"""Optimizers with a parameter group per skippable module and decay, the mask of their step, timm's cosine schedule."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from lgp_dist.config.run_config import TrainConfig
from lgp_dist.engine.gradients import skippable_module_of

EMA = "ema"
"""The optimizer's name of a weight's moving average, and a group's key of its decay."""
Decays = Callable[[str, Parameter], bool]


def decays_matrix(name: str, parameter: Parameter) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to vectors, class and position embedding."""
    return parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))


def build_optimizer(
    module: nn.Module,
    train: TrainConfig,
    decays: Decays = decays_matrix,
    skippable: tuple[str, ...] = (),
    rates: Mapping[str, float] = MappingProxyType({}),
) -> Optimizer:
    """Returns the optimizer, with two parameter groups per skippable module: with and without weight decay.

    module: weights that it names in `fixed_weights` have no decay, since training leaves them as they are.
    skippable: names of the modules that a step may skip. A group's key `module` names its module, "" for parameters of
    none of them. rates: learning rate factors by module, 1 by default; timm's schedule applies a group's `lr_scale`.
    """
    groups: dict[tuple[str, bool], list[Parameter]] = {}
    fixed = getattr(module, "fixed_weights", ())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = name not in fixed and decays(name, parameter)
            groups.setdefault((skippable_module_of(name, skippable), decay), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "weight_decay": train.weight_decay if decay else 0.0,
            "module": module_name,
            "lr_scale": rates.get(module_name, 1.0),
            EMA: train.ema,
        }
        for (module_name, decay), parameters in groups.items()
    ]
    if train.optimizer == "sgd":
        return SGD(settings, lr=train.lr, momentum=train.momentum)
    return AdamW(settings, lr=train.lr, eps=train.eps, fused=True)  # one pass over each tensor, on CPUs too


def rate_of(optimizer: Optimizer) -> float:
    """Returns the learning rate of the groups with factor 1, or of the first group if every factor is another."""
    groups = optimizer.param_groups
    return next((group["lr"] for group in groups if group["lr_scale"] == 1), groups[0]["lr"])


class StepMask:
    """Excludes modules from an optimizer's step: no decay, no update, moments, averages and step counts unchanged.

    Works on whatever tensors the groups hold at the step: parameters, or DeepSpeed's flat partitions.
    """

    def __init__(self, optimizer: Optimizer):
        self.active: Collection[str] | None = None
        """Modules that the next step updates; None for all."""
        self.skip_all = False
        """Whether the next step updates nothing."""
        self._kept: list[tuple[Parameter, Tensor]] = []
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def _before(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        for group in optimizer.param_groups:
            idle = group["module"] and self.active is not None and group["module"] not in self.active
            idle = idle or self.skip_all
            for parameter in group["params"] if idle or group[EMA] else ():
                materialise(optimizer, group, parameter)  # an average starts from the weight before its first step
                if idle and parameter.grad is not None:
                    self._kept.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group[EMA] else ():
                if parameter.grad is not None:
                    optimizer.state[parameter][EMA].lerp_(parameter.detach(), 1 - group[EMA])
        for parameter, gradient in self._kept:  # offloaded partitions keep their gradient buffer
            parameter.grad = gradient
        self._kept = []

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()


def materialise(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Creates the state that the optimizer would create at the parameter's first step, so that checkpoints have it."""
    state = optimizer.state[parameter]
    if state:
        return
    if isinstance(optimizer, AdamW):
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    elif group.get("momentum"):
        state["momentum_buffer"] = torch.zeros_like(parameter)
    if group.get(EMA):
        state[EMA] = parameter.detach().clone()


def build_schedule(optimizer: Optimizer, train: TrainConfig, steps: int, steps_per_epoch: float) -> CosineLRScheduler:
    """Returns a linear warm-up and a cosine to min_lr at the last step; `step_update(step)` sets the learning rate."""
    warmup = min(round(train.warmup_epochs * steps_per_epoch), steps // 2)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps),
        lr_min=train.min_lr,
        warmup_t=warmup,
        warmup_lr_init=train.min_lr,
        t_in_epochs=False,
    )


def planned_steps(train: TrainConfig, steps_per_epoch: float) -> int:
    """Returns the optimizer steps of the run: its epochs, but at most max_steps."""
    steps = max(1, round(train.epochs * steps_per_epoch))
    return min(steps, train.max_steps) if train.max_steps else steps
