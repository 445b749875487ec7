"""Defects of DeepSpeed 0.19.8 that this project works round, each here and nowhere else.

tests/distributed/test_deepspeed_workarounds.py shows each of them on DeepSpeed alone, and fails when it is mended.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import ZeroParamStatus
from torch import Tensor, nn


def skip_operator_probes() -> None:
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
    if isinstance(buffer := getattr(optimizer, "grad_partitions_flat_buffer", None), Tensor):
        buffer.zero_()
    for _, partition in _offloaded(optimizer):
        partition.grad.zero_()


def _offloaded(optimizer: Any) -> Iterator[tuple[int, Tensor]]:
    """Partitions of an offloaded optimizer, which keep their gradients, with the numbers of their groups."""
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            for index, partition in enumerate(getattr(optimizer, name, ())):
                if partition.grad is not None:
                    yield index, partition


def reduced_gradients(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """This rank's share of the gradients under ZeRO-1 to 3, after a step's last backward, with their group's module."""
    optimizer = engine.optimizer
    for event in getattr(optimizer, "_pending_offload_events", {}).values():
        event.synchronize()
    found = [(index, partition.grad) for index, partition in _offloaded(optimizer)]
    if not found:
        found = [(index, tensor) for index, group in optimizer.averaged_gradients.items() for tensor in group or ()]
    group_of = getattr(optimizer, "sub_group_to_group_id", None)
    for index, tensor in found:
        yield optimizer.optimizer.param_groups[group_of[index] if group_of else index]["module"], tensor


def drop_gradients(engine: Any) -> None:
    """Before a step that is left out: zeros, so that the gate alone leaves it out.

    At gradients that are not finite DeepSpeed would not call the optimizer, without a word, which then makes no state.
    """
    for _, gradient in reduced_gradients(engine):
        gradient.zero_()
    getattr(engine.optimizer, "norm_for_param_grads", {}).clear()


@dataclass(frozen=True, eq=False)
class OptimizerSlice:
    """Where the optimizer holds elements of a parameter."""

    flat: Tensor
    """What stands in the optimizer's group: the parameter itself, or a partition that holds parts of many."""
    offset: int
    """Of the first element in `flat`."""
    start: int
    """Of the first element in the flattened parameter."""
    count: int
    """Elements."""
    group: int
    """Of the optimizer's groups."""


def partitions(engine: Any, named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, OptimizerSlice]]:
    """Name and place of every parameter of which this rank's partitions of ZeRO-1, 2 or 3 hold a part.

    Read from DeepSpeed's own maps. Its universal checkpoint has the same, but gives every group of ZeRO-3 the settings
    and the step count of group 0, knows no ZeRO-0, and is read and written as pickles.
    """
    optimizer = engine.optimizer
    for name, parameter in named:
        if hasattr(parameter, "ds_tensor"):
            number, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = engine.global_rank * count  # the last ranks' parts hold padding
            count = max(0, min(count, parameter.ds_numel - start))
            flat, group = optimizer.fp32_partitioned_groups_flat[number], optimizer.sub_group_to_group_id[number]
        elif (mapping := parameter._hp_mapping) is not None:
            group = mapping.param_group_index
            flat = optimizer.single_partition_of_fp32_groups[group]
            offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
            count = mapping.hp_fragment_address.numel
        else:
            continue
        yield name, OptimizerSlice(flat, offset, start, count, group)


def gathered(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Those parameters that ZeRO-3 holds gathered at this moment, or is gathering, by name."""
    return {
        name: parameter
        for name, parameter in named
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
