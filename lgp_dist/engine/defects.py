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
    if isinstance(buffer := getattr(optimizer, "grad_partitions_flat_buffer", None), Tensor):
        buffer.zero_()
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            for partition in getattr(optimizer, name, ()):
                if partition.grad is not None:
                    partition.grad.zero_()


class GroupSettings:
    """What ZeRO-3 loses of an optimizer in a universal checkpoint: settings and step count of each parameter group.

    DeepSpeed gives every group those of group 0 when it loads one. Has `state_dict` and `load_state_dict`, so it can be
    given to `accelerator.register_for_checkpointing`, which loads it after the engine.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def _partitions(self) -> list[tuple[int, Tensor]]:
        optimizer = self.engine.optimizer
        flat = optimizer.fp32_partitioned_groups_flat
        return [(optimizer.sub_group_to_group_id[index], partition) for index, partition in enumerate(flat)]

    def state_dict(self) -> dict[str, Any]:
        """Settings of every group without its parameters, and its number of steps."""
        base = self.engine.optimizer.optimizer
        steps = {group: float(base.state[flat].get("step", 0.0)) for group, flat in self._partitions()}
        groups = [{name: value for name, value in group.items() if name != "params"} for group in base.param_groups]
        return {"groups": groups, "steps": [steps[index] for index in range(len(groups))]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts them back."""
        base = self.engine.optimizer.optimizer
        for group, settings in zip(base.param_groups, state["groups"], strict=True):
            group.update(settings)
        for group, flat in self._partitions():
            if "step" in base.state[flat]:
                base.state[flat]["step"] = torch.tensor(state["steps"][group])


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
