"""A small module with its optimizer and checkpoints in one process, and a disk that fails, records or is replayed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lgp_dist.config.run_config import CheckpointConfig, EngineConfig
from lgp_dist.engine.checkpointer import Checkpointer
from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.checkpoints.disk import Disk
from lgp_dist.engine.checkpoints.manifest import TrainState
from lgp_dist.engine.fragments import Fragments
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.workers import Workers

ALONE = Workers(Launch.from_environment({}), EngineConfig(precision="fp32"), 0, 1, torch.device("cpu"))


def state(step: int, **more: Any) -> TrainState:
    """Of a run without data."""
    fields: dict[str, Any] = {"stage": "s", "steps": 100, "seed": 0, "data": {}, "config": {}, "world": 1}
    return TrainState(**{**fields, "step": step, "engine": "ddp", **more})


class Toy:
    """A module that is trained by random gradients, and the checkpoints of it."""

    def __init__(self, folder: Path, disk: Disk | None = None, **config: Any):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.checkpoint_dir = CheckpointDir(folder, disk or Disk())
        fragments = Fragments(self.module, self.optimizer, None, 0, 1)
        self.checkpointer = Checkpointer(self.checkpoint_dir, ALONE, fragments, CheckpointConfig(**config))

    def train(self, step: int) -> None:
        """One step of gradients that are a function of its number."""
        torch.manual_seed(step)
        for parameter in self.module.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def save(self, step: int, **more: Any) -> None:
        """A whole checkpoint, or what becomes of it."""
        self.checkpointer.save(state(step, **more))
        self.checkpointer.wait()

    def restore(self, resume: str = "auto", check: Callable[[TrainState], None] = lambda found: None) -> int | None:
        """The step that was loaded."""
        found = self.checkpointer.restore(resume, "s", check)
        return None if found is None else found.step

    def values(self) -> dict[str, Tensor]:
        """Copies of weights and optimizer state."""
        found = {name: value.clone() for name, value in self.module.state_dict().items()}
        for index, parameter in enumerate(self.module.parameters()):
            for kind, value in self.optimizer.state[parameter].items():
                found[f"{index}.{kind}"] = value.clone()
        return found


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@dataclass(frozen=True)
class FailingDisk(Disk):
    """Fails at one of its calls, after half of the work where that is writing."""

    fail_at: int
    error: OSError = field(default_factory=lambda: OSError(28, "No space left on device"))
    calls: list[str] = field(default_factory=list)

    def _due(self, name: str) -> bool:
        self.calls.append(name)
        return len(self.calls) == self.fail_at

    def make(self, folder: Path) -> None:
        if self._due("make"):
            raise self.error
        super().make(folder)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if self._due("write_tensors"):
            content = save(dict(tensors))
            path.write_bytes(content[: len(content) // 2])
            raise self.error
        super().write_tensors(path, tensors)

    def write_text(self, path: Path, text: str) -> None:
        if self._due("write_text"):
            path.write_text(text[: len(text) // 2])
            raise self.error
        super().write_text(path, text)

    def rename(self, old: Path, new: Path) -> None:
        if self._due("rename"):
            raise self.error
        super().rename(old, new)

    def remove(self, folder: Path) -> None:
        if self._due("remove"):
            raise self.error
        super().remove(folder)
