"""Run by `accelerate launch` or alone: fine-tunes a small pool with the project's loop and writes the weights.

Arguments: output folder. One safetensors file per case.
"""

import sys
from pathlib import Path

import torch
from cases import CASES, SEED, STEPS, build, small_data, train_config
from safetensors.torch import save_file

from lgp_dist.config import EngineConfig, FinetuneConfig
from lgp_dist.data.stream import TrainStream, open_split
from lgp_dist.engine.loop import train
from lgp_dist.engine.setup import Workers
from lgp_dist.sampling import PathSampler
from lgp_dist.tasks.finetune import FinetuneTask


def main() -> None:
    folder = Path(sys.argv[1])
    for case in CASES:
        workers = Workers.start(EngineConfig(precision=case.precision))
        torch.set_num_threads(1)
        pool, ancestry = build()
        config = train_config(case)
        data = small_data()
        stream = TrainStream(open_split(data, "train"), data, config, SEED, workers.rank, workers.world)
        task = FinetuneTask(
            pool, ancestry, PathSampler(pool.space.paths, case.policy, SEED), FinetuneConfig(policy=case.policy)
        )
        done = train(
            task, stream.batches, config, workers, stage=case.name, steps_per_epoch=STEPS, run_dir=folder, trackers=()
        )
        assert done["steps"] == STEPS
        state = {name: value.detach().clone() for name, value in pool.state_dict().items()}
        save_file(state, folder / f"{case.name}-rank{workers.rank}-of{workers.world}.safetensors")
    workers.barrier()
    workers.close()


if __name__ == "__main__":
    main()
