"""Defects of DeepSpeed 0.19.8 that this project works round, each here and nowhere else.

tests/distributed/test_defects.py shows each of them on DeepSpeed alone, and fails when it is mended.
"""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import ZeroParamStatus
from torch import Tensor, nn


def spare_probes() -> None:
    """None of DeepSpeed's own operators is used on a CPU.

    Saying so spares a probe that compiles each of them, and the shared-memory all-reduce (for inference), which leaves
    69 MB in /dev/shm for each rank killed.
    """
    deepspeed.ops.__compatible_ops__ = {}


def forget_gradients(engine: Any) -> None:
    """After a step: clears the buffers from which DeepSpeed would take a gradient again that this step did not reduce.

    ZeRO-3 always, stages 1 and 2 with an offloaded optimizer: their buffers are written when a parameter is reduced and
    never cleared, so a parameter that is not reduced in a step is updated with its last gradient, on one process too.
    """
    optimizer = engine.optimizer
    for name in ("grad_partitions_flat_buffer",):
        if isinstance(buffer := getattr(optimizer, name, None), Tensor):
            buffer.zero_()
    if getattr(optimizer, "cpu_offload", False):
        for partition in optimizer.single_partition_of_fp32_groups:
            if partition.grad is not None:
                partition.grad.zero_()


def gathered(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that ZeRO-3 holds gathered at this moment, or is gathering, by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if getattr(parameter, "ds_status", ZeroParamStatus.NOT_AVAILABLE) != ZeroParamStatus.NOT_AVAILABLE
    }


def make_whole(module: nn.Module) -> None:
    """Makes a module that ZeRO-3 partitioned a plain one again, with all weights on every rank.

    DeepSpeed's own `destroy` takes its hooks off and leaves the weights partitioned.
    """
    for owner in module.modules():
        plain: dict[str, Any] = {}
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                plain[name] = None
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
            plain[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        owner._parameters = plain
        for name in [name for name in vars(owner) if name.startswith(("ds_", "_original_parameters"))]:
            delattr(owner, name)
    torch.cuda.empty_cache()
