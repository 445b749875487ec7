"""A micro-step's forward, losses and backward never read a value on the host, which would wait for a GPU.

On a CPU by the operations that read one; on a GPU by torch's own alarm too. Once in an optimizer step the guard waits,
behind the last backward.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics_cases import shake, stock_vit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lgp_dist.config import DistilConfig, FinetuneConfig, RowConfig
from lgp_dist.engine.gradients import Contract, Gradients
from lgp_dist.engine.setup import autocast
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths import PathSpace
from lgp_dist.protocols import Batch, StepContext, Task
from lgp_dist.sampling import PathSampler
from lgp_dist.tasks.distil import DistilTask
from lgp_dist.tasks.finetune import FinetuneTask

SPACE = PathSpace((16, 32), 3, image_size=28, patch_size=7, channels=1, num_classes=10)
HEADS = (2, 4)
ATEN = torch.ops.aten
READING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.equal, ATEN.masked_select, ATEN._unique2, ATEN.bincount}
"""Operations whose result, or its size, is a value that the host needs."""
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


class Reads(TorchDispatchMode):
    """Names of operations that read on the host, in `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """The operation itself."""
        masked = func.overloadpacket in (ATEN.index, ATEN.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or func.overloadpacket in READING:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def finetune_task(**values: Any) -> Task:
    torch.manual_seed(0)
    pool = LearngenePool.empty(SPACE, HEADS)
    shake(pool)
    sampler = PathSampler(SPACE.paths, "independent", 0)
    return FinetuneTask(pool, Ancestry(stock_vit(32, 6, 4)), sampler, FinetuneConfig(**values))


def distil_task() -> Task:
    torch.manual_seed(0)
    rows = (RowConfig(16, HEADS[0], "dense"), RowConfig(32, HEADS[1], "last"))
    config = DistilConfig()
    module = AuxiliaryRows(build_rows(SPACE, rows, config, ancestry_depth=6, ancestry_width=32))
    shake(module)
    return DistilTask(module, Ancestry(stock_vit(32, 6, 4)), config)


TASKS: dict[str, Callable[[], Task]] = {
    "finetune": finetune_task,
    "two paths a batch": lambda: finetune_task(paths_per_batch=2),
    "hard labels": lambda: finetune_task(distil="hard"),
    "distil": distil_task,
}


def batch_on(device: str, soft: bool) -> Batch:
    """Images with labels, or with shares of classes as mixup gives them."""
    targets = torch.randn(4, 10).softmax(-1) if soft else torch.tensor([3, 0, 9, 3])
    return Batch(torch.randn(4, 1, 28, 28), targets, torch.ones(4)).to(torch.device(device))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("contract", ["chain", "anchors", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TASKS)
def test_no_value_is_read_in_a_micro_step(name: str, precision: Any, contract: Contract, device: str) -> None:
    task = TASKS[name]()
    task.to(torch.device(device))
    task.module.to(device).train()
    gradients = Gradients(task.module, task.walk, contract)
    batches = [batch_on(device, soft) for soft in (False, True)]
    losses: list[Tensor] = []
    with Reads() as reads:
        for step, batch in enumerate(batches * 3):
            context = StepContext(step, 0, 0, 1)
            gradients.used = task.used(context)
            if device == "cuda" and step:  # the first one loads kernels
                torch.cuda.set_sync_debug_mode("error")
            try:
                with autocast(device, precision):
                    losses.append(task.losses(task.module, batch, context)["loss"])
                losses[-1].backward()
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
    gradients.close()
    assert reads.seen == []
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    assert any(parameter.grad is not None for parameter in task.module.parameters())


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_a_read_is_seen(read: Callable[[Tensor], Any]) -> None:
    values = torch.randn(4)
    with Reads() as reads:
        read(values)
    assert reads.seen
