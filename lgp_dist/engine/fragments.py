"""Which elements of weights and optimizer state this rank holds, under every engine, by the names of parameters.

Plain engines (DDP, ZeRO-0) hold everything on every rank, so each rank writes a share. ZeRO-1 and 2 hold a part of a
flat buffer per parameter group, ZeRO-3 a part of every parameter. All are views: reading and writing them is reading
and writing the engine's memory.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lgp_dist.engine.checkpoints.tensor_slices import WEIGHT, TensorSlice
from lgp_dist.engine.deepspeed_workarounds import OptimizerSlice, partitions
from lgp_dist.engine.optim import materialise


class Fragments:
    """The state of one module and optimizer on one rank."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, engine: Any, rank: int, world: int):
        """engine: DeepSpeed's where it partitions (ZeRO-1 to 3), None where every rank holds everything."""
        self.engine, self.rank, self.world = engine, rank, world
        self.base = engine.optimizer.optimizer if engine is not None else optimizer
        self.named = list(module.named_parameters())
        fixed = [name for name, parameter in self.named if not parameter.requires_grad]
        fixed += [name for name, _ in module.named_buffers()]
        if fixed:
            raise ValueError(f"a checkpoint would not hold {', '.join(fixed)}, which no optimizer trains")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, whole."""
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in self.named}

    def written(self) -> list[TensorSlice]:
        """This rank's share; over all ranks every element comes once."""
        found = []
        for held in self._held():
            if self.engine is None:
                count = held.values.numel()
                first, end = (count * part // self.world for part in (self.rank, self.rank + 1))
                held = TensorSlice(held.parameter, held.kind, first, held.values[first:end])
            if held.values.numel():
                found.append(held)
        return found

    def read(self) -> list[TensorSlice]:
        """Everything that this rank holds, weights that the module computes with included."""
        return [*self._held(), *self._copies()]

    def steps(self) -> dict[str, float]:
        """How often the optimizer has updated each parameter of which this rank holds a part."""
        return {name: float(counter) for name, counter in self._counters()}

    def set_steps(self, steps: dict[str, float]) -> None:
        """Puts them back."""
        for name, counter in self._counters():
            counter.fill_(steps[name])

    def _counters(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's count of updates beside each parameter; parameters of a partition share one. SGD has none."""
        for name, place in self._places():
            if "step" in (state := self._state(place)):
                yield name, state["step"]

    def _held(self) -> Iterator[TensorSlice]:
        for name, place in self._places():
            part = slice(place.offset, place.offset + place.count)
            for kind, value in {WEIGHT: place.flat, **self._state(place)}.items():
                if isinstance(value, Tensor) and value.shape == place.flat.shape:
                    yield TensorSlice(name, kind, place.start, value.detach().view(-1)[part])

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
        """Weights beside the optimizer's own: whole under ZeRO-1 and 2, this rank's part under ZeRO-3."""
        if self.engine is None:
            return
        for name, parameter in self.named:
            local, start, end = parameter, 0, parameter.numel()
            if hasattr(parameter, "ds_tensor"):
                local, end = parameter.ds_tensor, parameter.ds_numel
                start = self.rank * local.numel()  # the last ranks' parts hold padding
            yield TensorSlice(name, WEIGHT, start, local.detach().view(-1)[: max(0, end - start)])
