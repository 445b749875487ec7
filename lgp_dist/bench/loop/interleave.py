"""The real loop of stage finetune on a recipe's pool, with what it is compared with taking turns inside it.

A loop asks for batches: where a block of its steps ends, the one who gives them runs what else is measured, and then
gives the next. So the loop under measurement is the whole of `engine.loop.train`, with its audits, guard, metrics file
and log, and a slow moment of the machine meets all that is compared.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from lgp_dist.bench.common import wait
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.stream import TrainStream, open_split
from lgp_dist.engine.loop import Batches, RunSetup, TrainingPlan, train
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.engine.workers import Workers
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.build import ancestry_vit
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.cost import TRAINING
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import heads_of
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch, Task
from lgp_dist.tasks.finetune import FinetuneTask


class Turns:
    """Batches for a loop in blocks of steps; of each block the first are not timed.

    begins(kind) is called before the first timed step, ended(kind, steps, seconds) after the last, when all ranks are
    there; `steps` are the numbers of the timed ones. Kinds follow each other in every round; there is one round more,
    the first, which should not count.
    """

    def __init__(
        self,
        source: Batches,
        accumulate: int,
        kinds: tuple[str, ...],
        size: tuple[int, int, int],
        wait: Callable[[], None],
        begins: Callable[[str], None],
        ended: Callable[[str, range, float], None],
    ):
        """size: rounds, timed steps of a block, and steps before them."""
        self.source, self.accumulate, self.kinds = source, accumulate, kinds
        self.rounds, self.timed, self.warm_up = size
        self.wait, self.begins, self.ended = wait, begins, ended
        self.began = 0.0

    @property
    def steps(self) -> int:
        """Of the loop: all blocks, and one step that ends the last."""
        return (self.rounds + 1) * len(self.kinds) * (self.warm_up + self.timed) + 1

    def __call__(self, first: int, count: int) -> Iterator[Batch]:
        """Batches of these steps, micro-step by micro-step."""
        stream = self.source(first, count)
        for step in range(first, first + count):
            self._turn(step)
            for _ in range(self.accumulate):
                yield next(stream)

    def _turn(self, step: int) -> None:
        size = self.warm_up + self.timed
        block, place = divmod(step, size)
        if place == 0 and block:
            self.wait()
            seconds = time.perf_counter() - self.began
            self.ended(self.kinds[(block - 1) % len(self.kinds)], range(step - self.timed, step), seconds)
        if place == self.warm_up:
            self.begins(self.kinds[block % len(self.kinds)])
            self.wait()
            self.began = time.perf_counter()


class Finetuning:
    """What stage finetune of a recipe trains, with random weights, on the processes of this launch."""

    def __init__(self, config: RunConfig, workers: Workers):
        self.config, self.workers, self.train = config, workers, config.finetune.train
        self.space = PathSpace.from_config(config)
        self.sampler = PathSampler.from_config(config, self.space)
        self.sampler.check(workers.world)
        self.index = index = open_split(config.data, config.data.train_split)
        reading = replace(self.train, accumulate=self.train.accumulate // config.finetune.paths_per_batch)
        self.stream = TrainStream(index, config.data, reading, config.seed, workers.rank, workers.world, workers.device)

    @property
    def per_rank(self) -> int:
        """Images of one rank in a micro-step."""
        return self.stream.per_rank

    @property
    def images(self) -> int:
        """Images that go through the pool in a step, over all ranks; one that takes two paths counts twice."""
        return self.per_rank * self.workers.world * self.train.accumulate

    def pool(self) -> LearngenePool:
        """The pool, with the same weights at every call and on every rank."""
        torch.manual_seed(self.config.seed)
        pool = LearngenePool.empty(self.space, heads_of(self.config))
        return pool.to(self.workers.device).train()

    def ancestry(self, *, prepared: bool) -> Ancestry | None:
        """The teacher, if the recipe has one in fine-tuning; prepared as the stage has it, or as timm made it."""
        if not self.config.finetune.distil_weight:
            return None
        torch.manual_seed(self.config.seed)
        ancestry, engine = Ancestry(ancestry_vit(self.config)).to(self.workers.device), self.config.engine
        precision = engine.ancestry(self.config.finetune.ancestry_precision)
        return ancestry.prepare(precision, engine.compile) if prepared else ancestry

    def task(self) -> FinetuneTask:
        """What the stage trains."""
        pool = self.pool()
        pool.set_ops(self.config.engine.ops)
        return FinetuneTask(pool, self.ancestry(prepared=True), self.sampler, self.config.finetune)

    def batches(self, first: int, count: int) -> Iterator[Batch]:
        """The stage's batches, from the recipe's shards."""
        uses = self.config.finetune.paths_per_batch
        return chain.from_iterable(batch.repeated(uses) for batch in self.stream.batches(first, count))

    def wait(self) -> None:
        """Until all ranks' devices have done what they were given."""
        wait(self.workers)

    def run(self, task: Task, turns: Turns, watchdog: Watchdog) -> None:
        """The loop, whole; metrics go to a folder that is removed."""
        count = turns.steps
        with tempfile.TemporaryDirectory() as folder:
            plan = TrainingPlan(
                task, replace(self.train, epochs=1.0, max_steps=0), gradients=self.config.finetune.gradients
            )
            setup = RunSetup("finetune", turns, float(count), Path(folder))
            train(plan, setup, replace(self.workers, watchdog=watchdog))

    def multiply_adds(self, steps: range) -> tuple[float, float]:
        """Of a rank in these steps, mean and the slowest's: forward and backward of its paths, without the ancestry."""
        mean = slowest = 0.0
        images, world = self.per_rank, self.workers.world
        for step in steps:
            plan = [[self.sampler.draw(step, m, r, world) for r in range(world)] for m in range(self.train.accumulate)]
            hands = zip(*plan, strict=True)
            work = [sum(TRAINING * images * self.space.cost(path).flops for path in hand) for hand in hands]
            mean, slowest = mean + sum(work) / world, slowest + max(work)
        return mean, slowest
