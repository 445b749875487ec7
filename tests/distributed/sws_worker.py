"""Run by `accelerate launch`: trains trials of SWS with the project's loop and writes their weights.

Arguments: a JSON list of trials, and the output folder.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from exact_worker import train_trial, workers_of
from safetensors.torch import save_file
from sws_trials import SPACE, SwsTrial

from lgp_dist.engine.workers import Workers
from lgp_dist.protocols import Batch


def run(trial: SwsTrial, started: Workers, folder: Path, index: int) -> None:
    """Trains one trial; rank 0 writes the weights under the names of the reference."""
    workers = workers_of(trial, started)
    module, task = trial.build()

    def batches(start: int, steps: int) -> Iterator[Batch]:
        for step in range(start, start + steps):
            for number in range(trial.accumulate):
                yield from trial.batch(step, number, workers.rank).repeated(trial.uses)

    train_trial(task, batches, trial, workers, folder, index)
    state = module.state_dict()
    if trial.kind == "finetune":
        rows = {path.key: module.row_state(path.first_row) for path in SPACE.paths}
        state = {f"{key}/{name}": value for key, row in rows.items() for name, value in row.items()}
    if workers.is_main:
        save_file({name: value.detach().clone() for name, value in state.items()}, folder / f"{index}.safetensors")


def main() -> None:
    trials = [SwsTrial(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    workers = Workers.start(trials[0].engine_config())
    torch.set_num_threads(1)
    for index, trial in enumerate(trials):
        run(trial, workers, Path(sys.argv[2]), index)
    workers.barrier()
    workers.close()


if __name__ == "__main__":
    main()
