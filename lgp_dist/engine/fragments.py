"""Which elements of weights and optimizer state this rank holds, under every engine, by parameter name.

DDP and ZeRO-0 hold everything on every rank, so each rank writes a share of it. ZeRO-1 and 2 hold a partition of a flat
buffer per parameter group, ZeRO-3 a partition of every parameter. All slices are views of the engine's own memory.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lgp_dist.engine.checkpoints.tensor_slices import WEIGHT, TensorSlice
from lgp_dist.engine.deepspeed_workarounds import OptimizerSlice, partitions, zero3
from lgp_dist.engine.optim import materialise
from lgp_dist.errors import UserError


class Fragments:
    """The state of one module and optimizer on one rank."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, engine: Any, rank: int, world: int):
        """engine: DeepSpeed's if it partitions (ZeRO-1 to 3), None if every rank holds everything."""
        self.engine, self.rank, self.world = engine, rank, world
        self.base = engine.optimizer.optimizer if engine is not None else optimizer
        self.named = list(module.named_parameters())
        fixed = [name for name, parameter in self.named if not parameter.requires_grad]
        fixed += [name for name, _ in module.named_buffers()]
        if fixed:
            raise UserError(
                f"A checkpoint would lack {', '.join(fixed)}, which no optimizer trains: train without checkpoints."
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all whole parameters."""
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in self.named}

    def written(self) -> list[TensorSlice]:
        """Returns what this rank writes. All ranks together write every element once."""
        found = []
        for held in self._held():
            if self.engine is None:
                count = held.values.numel()
                first, end = (count * share // self.world for share in (self.rank, self.rank + 1))
                held = TensorSlice(held.parameter, held.kind, first, held.values[first:end])
            if held.values.numel():
                found.append(held)
        return found

    def read(self) -> list[TensorSlice]:
        """Returns everything that this rank reads, including the weights that the module computes with."""
        return [*self._held(), *self._copies()]

    def steps(self) -> dict[str, float]:
        """Returns how often the optimizer has updated each parameter of which this rank holds elements."""
        return {name: float(counter) for name, counter in self._counters()}

    def set_steps(self, steps: Mapping[str, float]) -> None:
        """Sets these counts."""
        for name, counter in self._counters():
            counter.fill_(steps[name])

    def _counters(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's counters of updates. Parameters of a partition share one; SGD has none."""
        for name, place in self._places():
            if "step" in (state := self._state(place)):
                yield name, state["step"]

    def _held(self) -> Iterator[TensorSlice]:
        for name, place in self._places():
            elements = slice(place.offset, place.offset + place.count)
            for kind, value in {WEIGHT: place.flat, **self._state(place)}.items():
                if isinstance(value, Tensor) and value.shape == place.flat.shape:
                    yield TensorSlice(name, kind, place.start, value.detach().view(-1)[elements])

    def _state(self, place: OptimizerSlice) -> dict[str, Any]:
        materialise(self.base, self.base.param_groups[place.group], place.flat)
        return self.base.state[place.flat]

    def _places(self) -> Iterator[tuple[str, OptimizerSlice]]:
        if self.engine is None:
            groups = {id(p): index for index, group in enumerate(self.base.param_groups) for p in group["params"]}
            for name, parameter in self.named:
                yield name, OptimizerSlice(parameter, 0, 0, parameter.numel(), groups[id(parameter)])
        else:
            yield from partitions(self.engine, self.named)

    def _copies(self) -> Iterator[TensorSlice]:
        """The module's weights, if the optimizer has its own: whole under ZeRO-1 and 2, a partition under ZeRO-3."""
        if self.engine is None:
            return
        for name, parameter in self.named:
            if (partitioned := zero3(parameter)) is None:
                yield TensorSlice(name, WEIGHT, 0, parameter.detach().view(-1))
            else:
                local = partitioned.ds_tensor.detach().view(-1)
                start = self.rank * local.numel()
                yield TensorSlice(name, WEIGHT, start, local[: max(0, partitioned.ds_numel - start)])
