"""A step of the loop reads no value on the host, which would wait for a GPU, but for the guard's one look at its end.

On a CPU by the operations that read one; on a GPU by torch's own alarm too.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numerics_cases import shake, stock_vit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lgp_dist.config.run_config import (
    DistilConfig,
    EngineConfig,
    FinetuneConfig,
    GradientConfig,
    RowConfig,
    TrainConfig,
)
from lgp_dist.engine import trainer as trainer_module
from lgp_dist.engine.gradients import Contract
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.loop import take_step
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.step_filter import StepVerdict
from lgp_dist.engine.trainer import Trainer
from lgp_dist.engine.workers import Workers
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch, Task
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


@contextlib.contextmanager
def watched(device: str, on: bool) -> Iterator[None]:
    """Torch's alarm for waits of a GPU, on or off."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error" if on else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


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


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("contract", ["chain", "gates", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TASKS)
def test_no_value_is_read_in_the_loops_step(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: Any, contract: Contract, device: str
) -> None:
    """Of the project's loop, with a trainer as a run makes it; but for the guard's one look, which is let through."""
    monkeypatch.setattr(trainer_module, "contract_of", lambda *_: contract)
    task, train = TASKS[name](), TrainConfig(batch_size=4 * 2, accumulate=2, clip_grad=1.0)
    workers = Workers(
        Launch.from_environment({}), EngineConfig(precision=precision, device=device), 0, 1, torch.device(device)
    )
    task.to(workers.device)
    optimizer = build_optimizer(task.module.to(device).train(), train, skippable=task.structure.skippable_modules)
    trainer = Trainer(workers, task, optimizer, train, GradientConfig())
    judge = trainer.step_filter.judge

    def judged(*arguments: Any) -> StepVerdict:
        with watched(device, on=False), _disable_current_modes():
            return judge(*arguments)

    trainer.step_filter.judge = judged
    batches = iter([batch_on(device, soft) for soft in (False, True)] * 3)
    with Reads() as reads:
        for step in range(3):
            with watched(device, on=step > 0):  # the first one loads kernels
                losses, *_ = take_step(trainer, batches, step)
    trainer.close()
    assert reads.seen == []
    assert len(losses) == 2 and all(bool(torch.isfinite(parts["loss"])) for parts in losses)


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
