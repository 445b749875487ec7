"""What an engine costs: bytes that ranks exchange, peak memory, and weights that ZeRO-3 holds gathered."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lgp_dist.engine.deepspeed_workarounds import gathered


class CommStats:
    """Bytes that this rank passes to collective operations while `counting`, by operation, and seconds in them."""

    def __init__(self, module: Any):
        """module: `Trainer.module`, before its first backward."""
        self.bytes: dict[str, int] = {}
        self._on, self._seconds = False, 0.0
        if isinstance(module, DistributedDataParallel):
            module.register_comm_hook(None, self._reduce)

    def _reduce(self, state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        if not self._on:
            return allreduce_hook(state, bucket)
        self.bytes["all_reduce"] = self.bytes.get("all_reduce", 0) + bucket.buffer().nbytes
        began, future = time.perf_counter(), allreduce_hook(state, bucket)
        future.wait()
        if bucket.buffer().is_cuda:
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - began
        return future

    def seconds(self) -> float:
        """Returns seconds in collective operations since `counting` began, including waits for other ranks.

        While counting, each operation is waited for. Exception: of the gathers that ZeRO-3 starts early on a CPU, only
        the start counts.
        """
        timers = deepspeed.comm.comm.timers.get_timers().values()
        self._seconds += sum(timer.elapsed() for timer in timers) / 1000
        return self._seconds

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Counts within the context. Operations then wait, so nothing overlaps."""
        logger = deepspeed.comm.comm.comms_logger
        logger.reset_data()
        self.seconds()
        self.bytes, self._on, self._seconds = {}, True, 0.0
        logger.enabled = logger.prof_all = True
        try:
            yield self.bytes
        finally:
            logger.enabled = logger.prof_all = self._on = False
            for name in logger.get_operation_names():
                sizes = logger.get_raw_data()[name].items()
                self.bytes[name] = self.bytes.get(name, 0) + sum(int(size) * facts[0] for size, facts in sizes)


def reset_peak(device: torch.device) -> None:
    """Forgets the peak memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Returns the peak memory since `reset_peak`: of torch's tensors on a GPU, of the process on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class Gathered:
    """The most units and elements that ZeRO-3 held gathered, at the end of forwards and the beginning of backwards."""

    def __init__(self, module: nn.Module, units: tuple[str, ...]):
        """Must be created before DeepSpeed wraps the module, so that DeepSpeed's hooks run after these."""
        self.named, self.names = list(module.named_parameters()), units
        self.units, self.elements = 0, 0
        self._hooks = [module.get_submodule(name).register_forward_hook(self._hook) for name in units]

    def _hook(self, unit: nn.Module, arguments: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        self._look()
        tokens = output[0] if isinstance(output, tuple) else output
        if tokens.requires_grad:
            tokens.register_hook(lambda gradient: self._look())

    def _look(self) -> None:
        found = gathered(self.named)
        units = {next(unit for unit in self.names if name.startswith(unit + ".")) for name in found}
        self.units = max(self.units, len(units))
        self.elements = max(self.elements, sum(parameter.ds_numel for parameter in found.values()))

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
