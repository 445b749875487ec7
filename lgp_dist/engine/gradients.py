"""Makes gradients whole on every rank when ranks train different paths.

A module is walked in one order by every rank (`protocols.Walk`): each unit is called once in every forward, and passes
its input through where the rank's path has no use for it. On this order stands one contract per engine:

* ZeRO-1 and ZeRO-2: a **chain** of anchors. At the entry of a unit stands one node of the autograd graph for each of
  its parameters, which passes the gradient on and gives a zero to the parameter if the path does not use it. Every
  parameter then has a gradient on every rank, and gets it when the unit's backward is over, in the order of the chain:
  by data dependency, not by autograd's queue. ZeRO fills its buckets in the order of gradients.
* DDP: **anchors**, one for all parameters of a unit. DDP's buckets hold fixed parameters and are reduced in a fixed
  order, so that every parameter must get a gradient on every rank, in whatever order.
* ZeRO-3: **leaves**. Every unit is a leaf module of DeepSpeed: gathered as a whole when it is called, used or not, and
  its gradients reduced as a whole when its backward is over, with zeros for what has none. DeepSpeed sees the end of a
  backward only through the gradient of an input.
* ZeRO-0: nothing. DeepSpeed reduces all parameters in the module's order, with zeros for what has no gradient.
* One process: nothing. Zeros are filled in before the optimizer's step.
* The union, in place of the chain at ZeRO-1 and ZeRO-2: nothing is reduced before the last micro-step's backward; then
  zeros are filled in for what this rank lacks of the step's union, and the union alone is reduced, in module order.

The first unit takes images, whose gradient nobody wants and which costs more than that of its weights: its nodes stand
on a **tick**, one number beside the images that is joined to what the unit gives. In backward they are ready at once,
and come last all the same, since autograd takes what was made last first. Models know nothing of this.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.nn import Parameter

from lgp_dist.protocols import Walk

Contract = Literal["chain", "anchors", "leaves", "none"]


class Anchor(torch.autograd.Function):
    """The identity on tokens, with parameters as further inputs: their gradients wait for this node."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, used: Sequence[bool], *parameters: Tensor) -> Tensor:
        """tokens: any shape, passed through. used: of each parameter, whether the forward behind this node uses it."""
        ctx.missing = [None if uses else _shape(tensor) for uses, tensor in zip(used, parameters, strict=True)]
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, and a zero for every parameter that the forward does not use."""
        return (gradient, None, *(kind and torch.zeros(kind[0], **kind[1]) for kind in ctx.missing))


class Join(torch.autograd.Function):
    """The identity on tokens, with a tick as a further input."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, tick: Tensor) -> Tensor:
        """tokens: any shape, passed through. tick: [1]."""
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and a zero for the tick."""
        return gradient, torch.zeros(1, device=gradient.device)


def _shape(tensor: Tensor) -> tuple[torch.Size, dict[str, Any]]:
    return tensor.shape, {"dtype": tensor.dtype, "device": tensor.device}


def part_of(name: str, parts: Collection[str]) -> str:
    """The part that holds a parameter; empty for one that every forward uses."""
    return next((part for part in parts if name.startswith(part + ".")), "")


class Gradients:
    """The contract of one module and engine, from before DeepSpeed wraps the module until `close`."""

    def __init__(self, module: nn.Module, walk: Walk, contract: Contract):
        self.module = module
        self.used: frozenset[str] = frozenset()
        self.parameters = [
            (name, parameter, part_of(name, walk.parts))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self._hooks = []
        self._first = module.get_submodule(walk.units[0]) if walk.units and contract != "none" else None
        self._leaves = [module.get_submodule(name) for name in walk.units] if contract == "leaves" else []
        for leaf in self._leaves:
            set_z3_leaf_module(leaf, True)
        if self._first is not None:
            self._hooks.append(self._first.register_forward_pre_hook(_tick))
            self._first.forward = _joined(self._first.forward)
        if contract in ("chain", "anchors"):
            for name in walk.units:
                mine = [(tensor, part) for full, tensor, part in self.parameters if full.startswith(name + ".")]
                nodes = [[one] for one in mine[::-1]] if contract == "chain" else [mine]
                self._hooks.append(module.get_submodule(name).register_forward_pre_hook(self._anchors(nodes)))

    def _anchors(self, nodes: list[list[tuple[Parameter, str]]]) -> Any:
        def hook(unit: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not torch.is_grad_enabled():
                return None
            changed, place = list(arguments), -1 if unit is self._first else 0
            for node in nodes:
                used = [not part or part in self.used for _, part in node]
                changed[place] = Anchor.apply(changed[place], used, *(parameter for parameter, _ in node))
            return tuple(changed)

        return hook

    def weigh(self, factors: Mapping[str, float]) -> None:
        """From now on multiplies gradients of the parts that `factors` names, which may change from step to step."""

        def scaled(part: str) -> Any:
            return lambda gradient: gradient * factors[part] if part in factors else gradient

        self._hooks += [tensor.register_hook(scaled(part)) for _, tensor, part in self.parameters if part]

    def fill(self, parts: Collection[str] | None = None) -> None:
        """Gives parameters without a gradient a zero: all, or those of some parts and of none."""
        for _, parameter, part in self.parameters:
            if parameter.grad is None and (parts is None or not part or part in parts):
                parameter.grad = torch.zeros_like(parameter)

    def close(self) -> None:
        """Takes every hook and mark off the module."""
        for hook in self._hooks:
            hook.remove()
        for leaf in self._leaves:
            del leaf._z3_leaf
        if self._first is not None:
            del self._first.forward


def _tick(unit: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A tick behind the first unit's arguments."""
    if not torch.is_grad_enabled():
        return None
    return (*arguments, torch.zeros(1, device=arguments[0].device, requires_grad=True))


def _joined(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The first unit's forward, which takes a tick behind its own arguments where there is one."""

    def joined(images: Tensor, path: Any, tick: Tensor | None = None) -> Tensor:
        tokens = forward(images, path)
        return tokens if tick is None else Join.apply(tokens, tick)

    return joined
