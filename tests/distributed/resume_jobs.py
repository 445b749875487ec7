"""Jobs that save and resume: trials of the table of exactness whose data does not depend on the number of ranks."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from exact_launch import HERE, run_workers
from exact_trials import Trial
from safetensors.torch import load_file
from torch import Tensor

from lgp_dist.config.run_config import TrainConfig
from lgp_dist.protocols import Batch

GLOBAL = 24
"""Images of an optimizer step."""


def part_of_batch(trial: Trial, step: int, micro: int, rank: int, world: int) -> Batch:
    """A rank's part of the step's images, which are the same for any number of ranks."""
    generator = torch.Generator().manual_seed(trial.seed * 997 + step)
    images = torch.randn(GLOBAL, 1, 14, 14, generator=generator)
    targets = torch.randint(5, (GLOBAL,), generator=generator)
    count = GLOBAL // (world * trial.accumulate)
    first = (micro * world + rank) * count
    part = slice(first, first + count)
    return Batch(images[part], targets[part], torch.ones(count))


@dataclass(frozen=True)
class Changing(Trial):
    """A trial whose number of ranks changes, for the reference."""

    at: int = 0
    """The first step on `then` ranks."""
    then: int = 0

    def world_at(self, step: int) -> int:
        """Ranks in a step."""
        return self.then if step >= self.at else self.world

    def batch(self, step: int, micro: int, rank: int) -> Batch:
        """As a job's."""
        return part_of_batch(self, step, micro, rank, self.world_at(step))


@dataclass(frozen=True)
class Elsewhere(Trial):
    """A trial whose steps have other data than their own, for the reference."""

    data: tuple[int, ...] = ()
    """Of each step, the step whose data it has."""

    def batch(self, step: int, micro: int, rank: int) -> Batch:
        """As a job's."""
        return part_of_batch(self, self.data[step], micro, rank, self.world)


@dataclass(frozen=True)
class Job:
    """A trial that is trained in a folder, from the start or from a checkpoint."""

    name: str
    trial: Trial
    resume: str = "auto"
    """auto, latest, never, or JOB/checkpoints/job/step-... in the same folder."""
    every: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    allow: list[str] = field(default_factory=list)
    elsewhere: str = ""
    """A second folder in which rank 1 looks for checkpoints, as where nodes share no file system."""
    constant: bool = False
    """Whether the rate is that of the trial's reference."""
    bad: list[int] = field(default_factory=list)
    """Steps whose data makes the loss nan, on the last rank alone."""
    rollback: int = 0
    """faults.rollback."""
    limit: int = 0
    """Bytes of the largest file that the last rank can write; 0 for any."""
    on_error: Literal["continue", "stop"] = "continue"
    """checkpoint.on_error."""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Job":
        """From JSON."""
        return cls(**{**fields, "trial": Trial(**fields["trial"])})

    def train_config(self) -> TrainConfig:
        """The trial's with the same images at any number of ranks, and a rate that changes unless it is `constant`."""
        config = replace(self.trial.train_config(), batch_size=GLOBAL)
        return config if self.constant else replace(config, min_lr=config.lr / 10, warmup_epochs=0.3)

    def batch(self, step: int, micro: int, rank: int) -> Batch:
        """A rank's part of the step's images."""
        batch = part_of_batch(self.trial, step, micro, rank, self.trial.world)
        faulty = step in self.bad and rank + 1 == self.trial.world
        return replace(batch, images=batch.images * math.nan) if faulty else batch


def launch(jobs: Sequence[Job], folder: Path) -> None:
    """Trains jobs of one world size, all of DeepSpeed or all of DDP, in one launch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    worker = [str(HERE / "resume_worker.py"), str(folder / "jobs.json"), str(folder)]
    done = run_workers(jobs[0].trial.world, jobs[0].trial.engine != "ddp", worker, len(jobs))
    (folder / "stderr.txt").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[:6000]


def whole_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as KIND/PARAMETER, put together from all ranks' files by the numbers in names."""
    parts: dict[str, dict[int, Tensor]] = {}
    for file in sorted(checkpoint.glob("rank-*.safetensors")):
        for key, value in load_file(file).items():
            name, start = key.rsplit("@", 1)
            assert int(start) not in parts.setdefault(name, {}), f"{key} comes twice"
            parts[name][int(start)] = value
    found = {}
    for name, pieces in parts.items():
        end = 0
        for start in sorted(pieces):
            assert start == end, f"{name} lacks elements {end} to {start}"
            end = start + len(pieces[start])
        found[name] = torch.cat([pieces[start] for start in sorted(pieces)])
    steps = json.loads((checkpoint / "manifest.json").read_text())["steps"]
    return found | {f"step/{name}": torch.tensor(count) for name, count in steps.items()}


def differences(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step of a job's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}
