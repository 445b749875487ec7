"""Run by `accelerate launch`: trains cells of SWS with the project's loop and writes their weights.

Arguments: a JSON list of cells, and the output folder.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from exact_worker import train_cell, workers_of
from safetensors.torch import save_file
from sws_cells import SPACE, SwsCell

from lgp_dist.engine.workers import Workers
from lgp_dist.protocols import Batch


def run(cell: SwsCell, started: Workers, folder: Path, index: int) -> None:
    """Trains one cell; rank 0 writes the weights under the names of the reference."""
    workers = workers_of(cell, started)
    module, task = cell.build()

    def batches(start: int, steps: int) -> Iterator[Batch]:
        for step in range(start, start + steps):
            for number in range(cell.accumulate):
                yield from cell.batch(step, number, workers.rank).repeated(cell.uses)

    train_cell(task, batches, cell, workers, folder, index)
    state = module.state_dict()
    if cell.kind == "finetune":
        rows = {path.key: module.row_state(path.row) for path in SPACE.paths}
        state = {f"{key}/{name}": value for key, row in rows.items() for name, value in row.items()}
    if workers.is_main:
        save_file({name: value.detach().clone() for name, value in state.items()}, folder / f"{index}.safetensors")


def main() -> None:
    cells = [SwsCell(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    workers = Workers.start(cells[0].engine_config())
    torch.set_num_threads(1)
    for index, cell in enumerate(cells):
        run(cell, workers, Path(sys.argv[2]), index)
    workers.barrier()
    workers.close()


if __name__ == "__main__":
    main()
