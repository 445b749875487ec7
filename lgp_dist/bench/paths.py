"""Seconds that each path takes on this machine, for `finetune.costs`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch.nn.functional import cross_entropy

from lgp_dist.bench.baseline_ratios import as_rows
from lgp_dist.bench.common import facts, finetune_models, interleaved, micro_batch, one_process, spread
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.trainer import prepare_module
from lgp_dist.errors import UserError
from lgp_dist.files import write_json
from lgp_dist.paths.path import Path as PoolPath
from lgp_dist.paths.space import space_of

COLUMNS = (("recipe", "path", "batch", "seconds", "spread"),)


def bench_paths(config: RunConfig, out: Path, batch: int = 0, repeats: int = 5) -> list[dict[str, Any]]:
    """Measures every path of a recipe's pool, as stage finetune trains it, and writes the table of `finetune.costs`.

    costs: seconds of forward and backward of a micro-step by path, median of `repeats` rounds in which all paths take
    turns. spread: (slowest - fastest) / median. ancestry: seconds of the ancestry's forward, null where it does not
    run. Weights and images are random. batch: images of a micro-step; 0 for the recipe's, on one rank. Returns an
    object for each path. UserError where a setting is out of range, there are several processes, the device is missing
    or the file cannot be written.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it.")
    workers = one_process(config, batch, repeats)
    space, data = space_of(config), micro_batch(config, config.finetune.train, batch, workers.device)
    pool, ancestry = finetune_models(config, workers)
    prepare_module(pool, workers)

    def train_path(path: PoolPath) -> None:
        with workers.autocast():
            logits = pool(data.images, path)
        cross_entropy(logits.float(), data.targets).backward()
        pool.zero_grad(set_to_none=True)

    def teach() -> None:
        with workers.autocast():
            ancestry(data.images)

    calls: dict[str, Callable[[], None]] = {path.key: partial(train_path, path) for path in space.paths}
    if ancestry is not None:
        calls["ancestry"] = teach
    seconds = interleaved(calls, workers.device, repeats, warm_up=1)
    middle = {key: median(values) for key, values in seconds.items()}
    table = {
        "recipe": config.recipe,
        "precision": config.engine.precision,
        "compile": config.engine.compile,
        "ops": config.engine.ops,
        "batch": len(data.images),
        "repeats": repeats,
        "costs": {path.key: middle[path.key] for path in space.paths},
        "ancestry": middle.get("ancestry"),
        "spread": {key: spread(values) for key, values in seconds.items()},
        **facts(workers.device),
    }
    workers.close()
    write_json(out, table)
    return as_rows(table)
