"""Gives every rank the same gradients in the same order, although ranks train different paths.

All ranks call the ordered modules of a task (`protocols.ModuleStructure`), called units, once in every forward and in
the same order; a unit that is not on a rank's path returns its input. Each engine has a contract on top of this order:

* `chain` (ZeRO-1 and ZeRO-2): a gate per parameter. ZeRO fills its buckets in the order in which gradients arrive, so
  that order must be the same on every rank.
* `gates` (DDP): one gate per unit. DDP reduces fixed buckets in a fixed order and only needs a gradient for every
  parameter.
* `leaves` (ZeRO-3): every unit is a leaf module of DeepSpeed, which gathers all its weights when it is called, and
  reduces all its gradients after its backward, with zeros for missing ones. DeepSpeed sees the end of a backward only
  through the gradient of an input, so the first unit needs an ordering token (below).
* `none` (ZeRO-0; one process; `engine.reduction` union). ZeRO-0 reduces all parameters in module order and sends zeros
  for missing gradients. One process fills in zeros before the optimizer's step. With the union, ranks reduce nothing
  until the last backward of a step, then fill in zeros and reduce what any rank used, in module order.

A gate is an autograd node on the tokens at the entry of a unit, with parameters of the unit as further inputs. A
gradient is released only when autograd reaches its gate, after the backward of the unit. The tokens' own gradient
passes through all gates, so gates form a chain: data dependency orders them, not autograd's queue.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.nn import Parameter

from lgp_dist.protocols import ModuleStructure

Contract = Literal["chain", "gates", "leaves", "none"]


class GradientGate(torch.autograd.Function):
    """The identity on tokens that releases gradients of parameters, with zeros for those that the forward skips."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, used: Sequence[bool], *parameters: Tensor) -> Tensor:
        """Returns the tokens, of any shape. used: for each parameter, whether the unit's forward uses it."""
        ctx.skipped = [
            None if uses else (tensor.shape, tensor.dtype, tensor.device)
            for uses, tensor in zip(used, parameters, strict=True)
        ]
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the tokens' gradient, and a zero for every skipped parameter."""
        zeros = (kind and torch.zeros(kind[0], dtype=kind[1], device=kind[2]) for kind in ctx.skipped)
        return (gradient, None, *zeros)


class JoinOrderingToken(torch.autograd.Function):
    """The identity on tokens that makes an ordering token part of their graph."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, ordering_token: Tensor) -> Tensor:
        """Returns the tokens, of any shape. ordering_token: [1]."""
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens' gradient, and a zero for the ordering token."""
        return gradient, torch.zeros(1, device=gradient.device)


def skippable_module_of(name: str, skippable: Collection[str]) -> str:
    """Returns the skippable module that holds a parameter, or "" for a parameter that every forward uses."""
    return next((module for module in skippable if name.startswith(module + ".")), "")


class Gradients:
    """Applies a contract to a module, from before DeepSpeed wraps it until `close`."""

    def __init__(self, module: nn.Module, structure: ModuleStructure, contract: Contract):
        self.module = module
        self.used: frozenset[str] = frozenset()
        """The skippable modules that the next forward uses."""
        self.parameters = [
            (name, parameter, skippable_module_of(name, structure.skippable_modules))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        """Name, parameter and skippable module of everything that is trained."""
        units = {name: module.get_submodule(name) for name in structure.ordered_modules}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._leaves = list(units.values()) if contract == "leaves" else []
        for leaf in self._leaves:
            set_z3_leaf_module(leaf, True)
        self._first = next(iter(units.values()), None) if contract != "none" else None
        if self._first is not None:
            self._hooks.append(self._first.register_forward_pre_hook(_add_ordering_token))
            self._first.forward = _joins_ordering_token(self._first.forward)
        if contract in ("chain", "gates"):
            for name, unit in units.items():
                mine = [(tensor, owner) for full, tensor, owner in self.parameters if full.startswith(name + ".")]
                gates = [[one] for one in mine[::-1]] if contract == "chain" else [mine]
                self._hooks.append(unit.register_forward_pre_hook(self._gates(gates)))

    def _gates(self, gates: list[list[tuple[Parameter, str]]]) -> Callable[..., tuple[Any, ...] | None]:
        """A hook that sends a unit's tokens, or its ordering token, through gates for these parameters."""

        def hook(unit: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not torch.is_grad_enabled():
                return None
            changed, place = list(arguments), -1 if unit is self._first else 0
            for gate in gates:
                used = [not owner or owner in self.used for _, owner in gate]
                changed[place] = GradientGate.apply(changed[place], used, *(parameter for parameter, _ in gate))
            return tuple(changed)

        return hook

    def weigh(self, factors: Mapping[str, float]) -> None:
        """Multiplies gradients from now on by the factor of their skippable module, which may change between steps."""

        def scaled(owner: str) -> Callable[[Tensor], Tensor]:
            return lambda gradient: gradient * factors[owner] if owner in factors else gradient

        self._hooks += [tensor.register_hook(scaled(owner)) for _, tensor, owner in self.parameters if owner]

    def fill(self, modules: Collection[str] | None = None) -> list[tuple[str, Tensor]]:
        """Gives zeros to parameters without a gradient: to all, or to those of these modules and of every forward.

        Returns all gradients that there are then, each with its skippable module.
        """
        found = []
        for _, parameter, owner in self.parameters:
            if parameter.grad is None and (modules is None or not owner or owner in modules):
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                found.append((owner, parameter.grad))
        return found

    def close(self) -> None:
        """Removes every hook and mark from the module."""
        for hook in self._hooks:
            hook.remove()
        for leaf in self._leaves:
            del leaf._z3_leaf
        if self._first is not None:
            del self._first.forward


# The first unit takes images. Gates on images would make autograd compute the gradient of images, which nobody needs
# and which costs more than that of the unit's weights. So its gates stand on an ordering token: one number that enters
# after the images and joins the unit's output. These gates are ready when the unit's backward begins, but run last:
# autograd runs the most recently created ready node first, and they were created first.


def _add_ordering_token(unit: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Appends an ordering token to the first unit's arguments."""
    if not torch.is_grad_enabled():
        return None
    return (*arguments, torch.zeros(1, device=arguments[0].device, requires_grad=True))


def _joins_ordering_token(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The first unit's forward, which takes an ordering token as its last argument and joins it to its output."""

    def joined(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        *given, ordering_token = arguments
        return JoinOrderingToken.apply(forward(*given), ordering_token)

    return joined
