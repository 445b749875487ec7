"""Run by `accelerate launch`: trains small pools on streams in which each rank meets bad samples of its own.

Arguments: a JSON list of cases (each a list of bad samples), and a folder. Each writes FOLDER/CASE: metrics.jsonl,
and end-RANK.safetensors, the weights at the end.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from exact_trials import Trial
from exact_worker import workers_of
from safetensors.torch import save_file

from lgp_dist.config.run_config import AugmentConfig, DataConfig
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.stream import TrainStream, open_split
from lgp_dist.engine.loop import RunSetup, TrainingPlan, train
from lgp_dist.engine.workers import Workers
from lgp_dist.tasks.finetune import FinetuneTask

SAMPLES, STEPS = 32, 4
SAMPLE = Path(__file__).parents[2] / "shards" / "sample"
TRIAL = Trial("zero2", 2, steps=STEPS)


def data(**settings: int) -> DataConfig:
    """Images as the trial's model takes them, as they are."""
    size, mean, std = 14, (0.25,), (0.5,)
    return DataConfig(str(SAMPLE), image_size=size, channels=1, num_classes=10, mean=mean, std=std, **settings)


def index_with(bad: list[int], options: DataConfig) -> ShardIndex:
    """The first training samples, of which some have another sum than their bytes."""
    index = open_split(options, "train")
    arrays = {name: getattr(index, name)[:SAMPLES] for name in ("shard", "offset", "size", "keys")}
    crc = index.crc[:SAMPLES].copy()
    crc[bad] ^= 1
    return dataclasses.replace(index, **arrays, label=index.label[:SAMPLES] % 5, crc=crc)


def stream_of(bad: list[int], rank: int, world: int) -> TrainStream:
    """Of one rank; every sample comes once."""
    options = data(threads=2, max_bad=SAMPLES, augment=AugmentConfig(hflip=0.0))
    config = dataclasses.replace(TRIAL.train_config(), batch_size=SAMPLES // STEPS)
    return TrainStream(index_with(bad, options), options, config, 0, rank, world)


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    workers = workers_of(TRIAL, Workers.start(TRIAL.engine_config()))
    torch.set_num_threads(1)
    for number, bad in enumerate(cases):
        place, stream = folder / str(number), stream_of(bad, workers.rank, workers.world)
        place.mkdir(exist_ok=True)
        pool, ancestry, sampler = TRIAL.build()
        task = FinetuneTask(pool, ancestry, sampler, TRIAL.finetune_config())
        plan = TrainingPlan(task, stream.train, gradients=TRIAL.finetune_config().gradients)
        train(plan, RunSetup(f"case {number}", stream.batches, STEPS, place, check=stream.check_bad), workers)
        save_file(
            {name: value.clone() for name, value in pool.state_dict().items()},
            place / f"end-{workers.rank}.safetensors",
        )
    workers.barrier()
    workers.close()


if __name__ == "__main__":
    main()
