"""What every stage is given, and what several of them need."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lgp_dist.config.flat import up_to
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.stream import TrainStream, clean_batches, evaluation_batches, evaluation_rounds, open_split
from lgp_dist.engine.evaluate import Forward, accuracies
from lgp_dist.engine.loop import RunSetup, TrainingPlan, train
from lgp_dist.engine.progress import shown
from lgp_dist.engine.saver import SaverConfig
from lgp_dist.engine.step_filter import StepFilter
from lgp_dist.engine.tracking import Tracking
from lgp_dist.engine.workers import Workers
from lgp_dist.models.ancestry import Ancestry, load_weights
from lgp_dist.models.build import build_ancestry, build_pool
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.path import Space
from lgp_dist.paths.space import heads_of, space_of
from lgp_dist.paths.stratified import draw_index
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.run.artifacts import Artifact, Provenance, RunDirectory
from lgp_dist.run.facts import Training
from lgp_dist.run.provenance import Environment
from lgp_dist.run.tensors import load_tensors

Fill = Callable[[Path], Mapping[str, Any]]
"""Writes a stage's files into a folder and returns what the stage measured."""


@dataclass(frozen=True)
class Context:
    """A run: what all its stages share."""

    config: RunConfig
    settings: Mapping[str, Any]
    """The configuration, flat."""
    run: RunDirectory
    workers: Workers
    manifest: ShardManifest
    """Of the shards that it reads."""
    environment: Environment
    """What it was started with."""
    tracking: Tracking = field(default_factory=Tracking)
    """The run's experiment trackers, on rank 0."""

    @cached_property
    def space(self) -> Space:
        """Paths of this run's pool."""
        return space_of(self.config)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each row."""
        return heads_of(self.config)

    @property
    def train_images(self) -> int:
        """Images of the training split."""
        return sum(entry.samples for entry in self.manifest.entries(self.config.data.train_split))

    def is_current(self, stage: str) -> bool:
        """Whether a stage is complete, as rank 0 finds it. Every rank calls it; one rank of a node hashes files."""
        return bool(self.workers.agree(self.workers.once_per_node(lambda: self.run.is_current(stage))))

    def require(self, stage: str) -> Artifact:
        """An earlier stage's artifact. Every rank calls it; one rank of a node hashes its files."""
        return Artifact(self.run.root / stage, self.workers.once_per_node(lambda: self.run.require(stage).record))

    def write(self, stage: str, inputs: Iterable[Artifact], fill: Fill, seconds: float) -> None:
        """Rank 0 makes the artifact; the others wait. Every rank calls it."""
        self.workers.watchdog.phase("artifact")
        if self.workers.is_main:
            about = self.environment
            provenance: Provenance = {
                "seconds": round(seconds, 1),
                "command": about["command"],
                "world": self.workers.world,
                "commit": about["commit"],
                "versions": about["versions"],
            }
            self.run.write(stage, inputs, fill, provenance)
        self.workers.barrier()

    def train(self, stage: str, plan: TrainingPlan, uses: int = 1) -> Training:
        """Trains on the training split. uses: micro-steps that each batch serves."""
        data, workers, train_config = self.config.data, self.workers, plan.config
        index = open_split(data, data.train_split)
        reading = replace(train_config, accumulate=train_config.accumulate // uses)
        stream = TrainStream(index, data, reading, self.config.seed, workers.rank, workers.world, workers.device)

        def batches(start: int, steps: int) -> Iterator[Batch]:
            return chain.from_iterable(batch.repeated(uses) for batch in stream.batches(start, steps))

        def describe(step: int, micro: int, rank: int) -> str:
            return stream.describe(step, micro // uses, rank)

        def seeds(context: StepContext) -> int:  # stochastic depth drops other samples on other ranks
            draw = (self.config.seed, stage, context.step, context.micro_step, context.rank)
            return draw_index(2**63, "torch", *draw)

        setup = RunSetup(
            stage=stage,
            batches=batches,
            steps_per_epoch=stream.steps_per_epoch,
            run_dir=self.run.root,
            tracking=self.tracking,
            check=stream.check_bad,
            step_filter=StepFilter(plan.task, workers, train_config.accumulate, self.config.faults, stage, describe),
            saver=self._saver_config(stage, stream),
            seeds=seeds,
        )
        return train(plan, setup, workers)

    def _saver_config(self, stage: str, stream: TrainStream) -> SaverConfig:
        """Checkpoints of a stage that trains. Earlier stages count by their artifacts."""
        config = self.config
        earlier = [self.run.find(name) for name in up_to(stage) if name != stage]
        made = {f"{artifact.record['stage']}.id": artifact.id for artifact in earlier if artifact}
        return SaverConfig(
            folder=self.run.root / "checkpoints" / stage,
            checkpoint=config.checkpoint,
            seed=config.seed,
            settings=self.run.depends_on(stage) | made,
            versions=self.environment["versions"],
            data_state=stream.state,
            data_restore=stream.restore,
            resume="never" if config.force else config.resume,
            allow=config.allow_change,
        )

    def accuracies(
        self, forwards: dict[str, Forward], limit: int | None = None, what: str = "accuracy"
    ) -> dict[str, tuple[float, float]]:
        """Top-1 and top-5 on the validation split, or on `limit` images of it. what: in words, for bar and log."""
        data, workers, size = self.config.data, self.workers, self.config.evaluate.batch_size
        workers.watchdog.phase("accuracy")
        index = open_split(data, data.val_split)
        batches = evaluation_batches(index, data, size, workers.rank, workers.world, limit, workers.device)
        total = evaluation_rounds(index, size, workers.world, limit)
        what = f"{what} of {len(forwards)} model{'s' * (len(forwards) > 1)}"
        return accuracies(forwards, shown(batches, workers.is_main, what, total, "batch"), workers)

    def clean_batches(self, images: int) -> Iterator[Batch]:
        """Training images without augmentation, the same on every rank."""
        data = self.config.data
        batches = clean_batches(open_split(data, data.train_split), data, images, 100, self.config.seed)
        for batch in self.workers.watchdog.over(batches):
            yield batch.to(self.workers.device)

    def load_ancestry(self, artifact: Artifact) -> Ancestry:
        """The frozen teacher that stage ancestry made, on this device, as timm builds it."""
        state = load_tensors(artifact.folder / "ancestry.safetensors")
        return build_ancestry(self.config, self.workers.device, state)

    def load_pool(self, artifact: Artifact, *, training: bool = False) -> LearngenePool:
        """The pool that stage pool or finetune made, on this device. training: as `build_pool`."""
        state = load_tensors(artifact.folder / "pool.safetensors")
        return build_pool(self.config, self.workers.device, state, training=training)

    def starting_pool(self, pooled: Artifact, *, training: bool = False) -> LearngenePool:
        """The pool that stage finetune trains from: stage pool's, or `finetune.start_weights`.

        UserError if these weights are another pool's.
        """
        pool, start = self.load_pool(pooled, training=training), self.config.finetune.start_weights
        if start:
            load_weights(pool, load_tensors(Path(start)), start, "pool", "model and data.num_classes")
        return pool

    def seed(self, stage: str, rank: int = 0) -> None:
        """Seeds torch: another for each stage; without a rank for what must be the same everywhere (initialisation)."""
        torch.manual_seed(draw_index(2**63, "torch", self.config.seed, stage, rank))
