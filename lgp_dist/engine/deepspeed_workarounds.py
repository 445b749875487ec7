"""Workarounds for defects of DeepSpeed 0.19.8, and the only access to the attributes that DeepSpeed adds to parameters.

tests/distributed/test_deepspeed_workarounds.py shows each defect with DeepSpeed alone, and fails once it is fixed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import deepspeed
import torch
from deepspeed.runtime.zero import ZeroParamStatus
from torch import Tensor, nn


class Zero3Parameter(Protocol):
    """What ZeRO-3 adds to a parameter that it partitions."""

    ds_tensor: Tensor
    """This rank's partition, [ceil(elements / ranks)]; the last ranks' partitions end in padding."""
    ds_numel: int
    """Elements of the whole parameter."""
    ds_shape: torch.Size
    """Of the whole parameter."""
    ds_status: ZeroParamStatus


def zero3(parameter: nn.Parameter) -> Zero3Parameter | None:
    """Returns a parameter with its ZeRO-3 attributes, or None if ZeRO-3 does not partition it."""
    return cast(Zero3Parameter, parameter) if hasattr(parameter, "ds_tensor") else None


def skip_operator_probes() -> None:
    """Makes DeepSpeed use none of its own operators on a CPU.

    Otherwise it compiles each of them to see whether it can, and starts a shared-memory all-reduce for inference, which
    leaves 69 MB in /dev/shm for each rank that is killed.
    """
    deepspeed.ops.__compatible_ops__ = {}


def forget_gradients(engine: Any) -> None:
    """Clears gradient buffers after a step. Without it, DeepSpeed applies old gradients again, on one process too.

    ZeRO-3, and stages 1 and 2 with an offloaded optimizer, write a buffer when a parameter is reduced and never clear
    it, so a parameter that a step does not reduce is updated with its last gradient.
    """
    optimizer = engine.optimizer
    if isinstance(buffer := getattr(optimizer, "grad_partitions_flat_buffer", None), Tensor):
        buffer.zero_()
    for _, gradient in _offloaded_gradients(optimizer):
        gradient.zero_()


def _offloaded_gradients(optimizer: Any) -> Iterator[tuple[int, Tensor]]:
    """Group number and gradient of every partition of an offloaded optimizer."""
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            for index, partition in enumerate(getattr(optimizer, name, ())):
                if partition.grad is not None:
                    yield index, partition.grad


def reduced_gradients(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the gradients under ZeRO-1 to 3 after a step's last backward, with their group's module."""
    optimizer = engine.optimizer
    for event in getattr(optimizer, "_pending_offload_events", {}).values():
        event.synchronize()
    found = list(_offloaded_gradients(optimizer))
    if not found:
        found = [(index, tensor) for index, group in optimizer.averaged_gradients.items() for tensor in group or ()]
    group_of = getattr(optimizer, "sub_group_to_group_id", None)
    for index, tensor in found:
        yield optimizer.optimizer.param_groups[group_of[index] if group_of else index]["module"], tensor


def drop_gradients(engine: Any) -> None:
    """Zeroes the gradients before a step that is skipped.

    If they are not finite, DeepSpeed silently does not call the optimizer, which then never creates its state.
    """
    for _, gradient in reduced_gradients(engine):
        gradient.zero_()
    getattr(engine.optimizer, "norm_for_param_grads", {}).clear()


@dataclass(frozen=True, eq=False)
class OptimizerSlice:
    """Where the optimizer holds elements of a parameter."""

    flat: Tensor
    """The tensor in the optimizer's group: the parameter itself, or a partition with elements of many parameters."""
    offset: int
    """Of the first element in `flat`."""
    start: int
    """Of the first element in the flattened parameter."""
    count: int
    """Elements."""
    group: int
    """Index of the optimizer's group."""


def partitions(engine: Any, named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, OptimizerSlice]]:
    """Yields every parameter of which this rank's ZeRO partitions hold elements, with their place.

    Reads DeepSpeed's own maps. Its universal checkpoint has them too, but gives every group of ZeRO-3 the settings and
    the step count of group 0, does not support ZeRO-0, and consists of pickles.
    """
    optimizer = engine.optimizer
    for name, parameter in named:
        if (partitioned := zero3(parameter)) is not None:
            number, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = engine.global_rank * count
            count = max(0, min(count, partitioned.ds_numel - start))
            flat, group = optimizer.fp32_partitioned_groups_flat[number], optimizer.sub_group_to_group_id[number]
        elif (mapping := cast(Any, parameter)._hp_mapping) is not None:
            group = mapping.param_group_index
            flat = optimizer.single_partition_of_fp32_groups[group]
            offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
            count = mapping.hp_fragment_address.numel
        else:
            continue
        yield name, OptimizerSlice(flat, offset, start, count, group)


def gathered(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Zero3Parameter]:
    """Returns the parameters that ZeRO-3 holds gathered at this moment, or is gathering, by name."""
    found = ((name, zero3(parameter)) for name, parameter in named)
    away = ZeroParamStatus.NOT_AVAILABLE
    return {name: parameter for name, parameter in found if parameter is not None and parameter.ds_status != away}


def make_whole(module: nn.Module) -> None:
    """Turns a module that ZeRO-3 partitioned into a plain one, with all weights on every rank.

    DeepSpeed's own `destroy` removes its hooks and leaves the weights partitioned.
    """
    for owner in module.modules():
        plain: dict[str, nn.Parameter | None] = {}
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
