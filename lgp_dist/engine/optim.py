"""AdamW with DeiT's parameter groups, and timm's cosine schedule in optimizer steps."""

from collections.abc import Callable

from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from lgp_dist.config import TrainConfig

Decays = Callable[[str, Parameter], bool]


def decays_matrix(name: str, parameter: Parameter) -> bool:
    """Whether a parameter is decayed: matrices are; vectors, class and position embedding are not."""
    return parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))


def build_optimizer(module: nn.Module, train: TrainConfig, decays: Decays = decays_matrix) -> AdamW:
    """AdamW over all trained parameters in two groups, decayed and not."""
    groups: dict[bool, list[Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter)].append(parameter)
    settings = [
        {"params": parameters, "weight_decay": train.weight_decay if decay else 0.0}
        for decay, parameters in groups.items()
        if parameters
    ]
    return AdamW(settings, lr=train.lr, eps=train.eps)


def build_schedule(optimizer: Optimizer, train: TrainConfig, steps: int, steps_per_epoch: float) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to min_lr at the last step; `step_update(step)` sets the rate."""
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
    """Optimizer steps of the run: its epochs, cut off at max_steps."""
    steps = max(1, round(train.epochs * steps_per_epoch))
    return min(steps, train.max_steps) if train.max_steps else steps
