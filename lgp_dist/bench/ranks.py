"""How benchmarks on the ranks of a launch begin, wait and end."""

from pathlib import Path
from typing import Any

import torch

from lgp_dist.artifacts import write_json
from lgp_dist.bench.figures import check_least
from lgp_dist.checks import check_config
from lgp_dist.config import RunConfig
from lgp_dist.engine.setup import Workers


def join(config: RunConfig, **numbers: int) -> Workers:
    """The processes of this launch; UserError where an option's number is below 1, or the recipe is refused."""
    for name, value in numbers.items():
        check_least("--" + name.replace("_", "-"), value, 1)
    check_config(config)
    return Workers.start(config.engine)


def wait(workers: Workers) -> None:
    """Until all ranks' devices have done what they were given."""
    if workers.device.type == "cuda":
        torch.cuda.synchronize()
    workers.barrier()


def leave(workers: Workers, out: Path, rows: list[dict[str, Any]]) -> None:
    """Rank 0 writes the objects; all ranks leave."""
    if workers.is_main:
        write_json(out, rows)
    workers.barrier()
    workers.close()
