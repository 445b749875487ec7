"""The contracts that make gradients whole, on one process: order, zeros, and what backward does not compute."""

from typing import Any

import pytest
import torch
from numerics_cases import HEADS, THREE, images
from torch.utils._python_dispatch import TorchDispatchMode

from lgp_dist.engine.gradients import Contract, Gradients
from lgp_dist.models.pool import LearngenePool
from lgp_dist.protocols import ModuleStructure

BATCH = images(2)
CONTRACTS: tuple[Contract, ...] = ("chain", "gates", "leaves", "none")


class Stems(TorchDispatchMode):
    """What backwards of patch embeddings compute, in `seen`: gradient of images, of weight, of bias."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def pool_of(checkpointed: bool) -> LearngenePool:
    torch.manual_seed(0)
    pool = LearngenePool.empty(THREE, HEADS[THREE]).train()
    pool.set_grad_checkpointing(checkpointed)
    return pool


def run(pool: LearngenePool, contract: Contract, path: Any) -> tuple[list[str], list[list[bool]]]:
    """Gradients of one path: in which order parameters got theirs, and what stems computed."""
    order: list[str] = []
    gradients = Gradients(pool, ModuleStructure(pool.ordered_modules, pool.skippable_modules), contract)
    gradients.used = pool.modules_of(path)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        for name, parameter in pool.named_parameters()
    ]
    with Stems() as stems:
        pool(BATCH, path).square().sum().backward()
    for hook in hooks:
        hook.remove()
    gradients.close()
    return order, stems.seen


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("contract", CONTRACTS)
def test_gradients_are_those_of_the_path(contract: Contract, checkpointed: bool) -> None:
    """And nobody computes a gradient of images; afterwards the module is as before."""
    for path in THREE.paths:
        plain, pool = pool_of(checkpointed), pool_of(checkpointed)
        plain(BATCH, path).square().sum().backward()
        _, seen = run(pool, contract, path)
        assert seen == [[False, True, True]]
        pairs = list(zip(plain.parameters(), pool.parameters(), strict=True))
        assert all(torch.equal(one.grad, two.grad) for one, two in pairs if one.grad is not None)
        assert all(two.grad is None or not two.grad.any() for one, two in pairs if one.grad is None)
        assert "forward" not in vars(pool.stem) and not pool.stem._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_chain_gives_gradients_in_one_order(checkpointed: bool) -> None:
    """To all parameters, whatever the path: from the head to the stem."""
    orders = [run(pool_of(checkpointed), "chain", path)[0] for path in THREE.paths]
    names = [name for name, _ in pool_of(checkpointed).named_parameters()]
    assert sorted(orders[0]) == sorted(names) and all(order == orders[0] for order in orders)
    stems = [name for name in orders[0] if name.startswith("stem.")]
    assert orders[0][-len(stems) :] == stems
    free = [run(pool_of(checkpointed), "none", path)[0] for path in THREE.paths]
    assert any(order != free[0] for order in free), "without the chain paths have orders of their own"


@pytest.mark.slow
@pytest.mark.parametrize("contract", ["chain", "gates"])
def test_every_parameter_gets_a_gradient(contract: Contract) -> None:
    """Zeros for what the path does not have, once each."""
    for path in THREE.paths:
        pool = pool_of(False)
        order, _ = run(pool, contract, path)
        assert sorted(order) == sorted(name for name, _ in pool.named_parameters())
