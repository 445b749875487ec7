"""Stops ranks that no longer do the same, before their gradients mix into the weights.

Under ZeRO-2 and DDP, ranks whose gradients arrive in different orders add gradients of different parameters, and
nothing fails. So each rank lists the events of a step: which units were called and which gradients arrived, in order.
Before the optimizer's step, ranks compare a checksum of these events and of the step's schedule, with one all-reduce of
two numbers on the host; only if it differs do they exchange the events and name the first difference.
"""

import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.protocols import ModuleStructure


def bits(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor's 32-bit words, int64 []. It does not depend on the order of summation."""
    return tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)


class DivergenceCheck:
    """Records what one rank does in a step, and compares it over ranks."""

    def __init__(self, module: nn.Module, structure: ModuleStructure, workers: Workers, *, gradients: bool):
        """gradients: also compare the order in which gradients arrive; off if it may differ without harm."""
        self.module, self.workers = module, workers
        self.events: list[int] = []
        self.names = list(structure.ordered_modules)
        self._hooks = [
            module.get_submodule(name).register_forward_pre_hook(self._unit(index))
            for index, name in enumerate(self.names)
        ]
        if gradients:
            for name, parameter in module.named_parameters():
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient(len(self.names))))
                self.names.append(name)

    def _unit(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(unit: nn.Module, arguments: Any) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # not a recomputation in backward
                self.events.append(index)

        return hook

    def _gradient(self, index: int) -> Callable[[Tensor], None]:
        return lambda parameter: self.events.append(index)

    def check(self, step: int, schedule: Iterable[frozenset[str]]) -> None:
        """Raises UserError if ranks differ.

        schedule: the skippable modules that each micro-step of each rank uses.
        """
        drawn = zlib.crc32("/".join(map(_named, schedule)).encode())
        events, self.events = self.events, []
        if not self.workers.equal(zlib.crc32(torch.tensor([drawn, *events]).numpy().tobytes())):
            raise UserError(
                f"Ranks diverged in step {step}: {self._difference(drawn, events)}; nothing of this step was applied: "
                "give every rank the same code, recipe and seed, and report it if they have."
            )

    def _difference(self, drawn: int, events: list[int]) -> str:
        ranks = self.workers.gather([drawn, events])
        for rank, (other, _) in enumerate(ranks):
            if other != ranks[0][0]:
                return f"rank {rank} has another schedule of paths than rank 0"
        names = [*self.names, "nothing"]
        for place, row in enumerate(zip_longest(*(found for _, found in ranks), fillvalue=-1)):
            for rank, event in enumerate(row):
                if event != row[0]:
                    return f"event {place + 1} is {names[event]} on rank {rank} and {names[row[0]]} on rank 0"
        return "the checksums differ, but not the events"

    def check_weights(self, step: int) -> None:
        """Raises UserError if a parameter differs over ranks. For engines under which each rank holds all of them."""
        named = list(self.module.named_parameters())
        sums = torch.stack([bits(parameter) for _, parameter in named]).tolist()
        if self.workers.equal(zlib.crc32(repr(sums).encode())):
            return
        table = torch.tensor(self.workers.gather(sums))
        rank, index = (table != table[0]).nonzero()[0].tolist()
        raise UserError(
            f"After step {step}, rank {rank} has other weights than rank 0, first in {named[index][0]}: start again "
            "from the last checkpoint, and report it."
        )

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()


@lru_cache(maxsize=4096)
def _named(modules: frozenset[str]) -> str:
    """The modules of a draw as text; a run has few paths."""
    return ",".join(sorted(modules))
