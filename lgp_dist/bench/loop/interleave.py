"""The loop of stage finetune on a recipe's pool, with other measurements in turns inside it.

The loop asks an iterator for batches. At the end of a block of steps the iterator runs the other measurements before it
yields the next batch. So the whole of `engine.loop.train` is measured, with its divergence check, step filter, metrics
and log, and a slow moment of the machine affects all that is compared.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from lgp_dist.bench.common import finetune_models, wait
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.stream import TrainStream, open_split
from lgp_dist.engine.loop import Batches, RunSetup, TrainingPlan, train
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.engine.workers import Workers
from lgp_dist.paths.cost import TRAINING
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.protocols import Batch, Task
from lgp_dist.tasks.finetune import FinetuneTask, finetune_task


class InterleavedBatches:
    """Batches for a loop, which divides its steps into blocks; the first steps of a block are not timed.

    begins(kind) is called before the first timed step of a block, and ended(kind, steps, seconds) after the last, when
    all ranks have done it; `steps` are the numbers of the timed ones. In each round there is a block of every kind, in
    their order. The rounds are one more than asked for; the first is a warm-up, which should not count.
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
        """size: rounds, timed steps of a block, and steps before them. wait: returns when all ranks have arrived."""
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
            self._before(step)
            for _ in range(self.accumulate):
                yield next(stream)

    def _before(self, step: int) -> None:
        """Ends a block before its next step, and begins the timed part of one."""
        block, place = divmod(step, self.warm_up + self.timed)
        if place == 0 and block:
            self.wait()
            seconds = time.perf_counter() - self.began
            self.ended(self.kinds[(block - 1) % len(self.kinds)], range(step - self.timed, step), seconds)
        if place == self.warm_up:
            self.begins(self.kinds[block % len(self.kinds)])
            self.wait()
            self.began = time.perf_counter()


class Finetuning:
    """Stage finetune of a recipe on the processes of this launch: its batches, and its models with random weights."""

    def __init__(self, config: RunConfig, workers: Workers):
        self.config, self.workers, self.train = config, workers, config.finetune.train
        self.space = space_of(config)
        self.sampler = PathSampler.from_config(config, self.space)
        self.sampler.check(workers.world)
        self.index = index = open_split(config.data, config.data.train_split)
        reading = replace(self.train, accumulate=self.train.accumulate // config.finetune.paths_per_batch)
        self.stream = TrainStream(index, config.data, reading, config.seed, workers.rank, workers.world, workers.device)

    @property
    def images(self) -> int:
        """Images that go through the pool in a step, over all ranks; one that takes two paths counts twice."""
        return self.stream.per_rank * self.workers.world * self.train.accumulate

    def task(self) -> FinetuneTask:
        """What the stage trains, with the same weights at every call and on every rank."""
        return finetune_task(self.config, *finetune_models(self.config, self.workers), self.sampler)

    def batches(self, first: int, count: int) -> Iterator[Batch]:
        """The stage's batches, from the recipe's shards."""
        uses = self.config.finetune.paths_per_batch
        return chain.from_iterable(batch.repeated(uses) for batch in self.stream.batches(first, count))

    def wait(self) -> None:
        """`common.wait` for these ranks."""
        wait(self.workers)

    def run(self, task: Task, batches: InterleavedBatches, watchdog: Watchdog) -> None:
        """Runs the whole loop; its metrics go to a temporary folder."""
        with tempfile.TemporaryDirectory() as folder:
            once = replace(self.train, epochs=1.0, max_steps=0)
            plan = TrainingPlan(task, once, gradients=self.config.finetune.gradients)
            setup = RunSetup("finetune", batches, float(batches.steps), Path(folder))
            train(plan, setup, replace(self.workers, watchdog=watchdog))

    def multiply_adds(self, steps: range) -> float:
        """Multiply-adds of a mean rank in these steps: forward and backward of its paths, without the ancestry."""
        world, count = self.workers.world, self.train.accumulate
        draws = [self.sampler.draw(step, m, r, world) for step in steps for m in range(count) for r in range(world)]
        return TRAINING * self.stream.per_rank * sum(self.space.cost(path).flops for path in draws) / world
