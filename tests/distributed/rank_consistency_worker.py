"""Three ranks over gloo that compare facts, once for every case: rank_consistency_worker.py FOLDER.

FOLDER/cases.json: name -> {"ranks", "key", "value"}: on these ranks a key of the recipe (`config.KEY`) or of the facts
has another value, or none. FOLDER/result-R.json: name -> the sentence on rank R; null where there was no error.
FOLDER/slowest-R: seconds of the longest comparison.
"""

import dataclasses
import json
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_ranks import fork_ranks

from lgp_dist.config.flat import flatten
from lgp_dist.config.run_config import EngineConfig, RunConfig
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.rank_consistency import check_equal, facts_of
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.recipes import tiny

WORLD = 3
PLAIN = {
    "code.recipes.py": "5a",
    "versions.torch": "2.15.0",
    "versions.triton": "not installed",
    "sources.data.train": "77",
    "count": 1,
    "name": "grün",
    "limits": [1.0, float("inf")],
}
"""Facts in addition to the recipe's, one of every type."""


def changed(config: Any, key: str, value: Any) -> Any:
    """The dataclass tree with another value under a dotted key."""
    head, _, rest = key.partition(".")
    if isinstance(config, tuple):
        index = int(head)
        return (*config[:index], changed(config[index], rest, value), *config[index + 1 :])
    inner = changed(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})


def facts_with(key: str, value: Any) -> dict[str, Any]:
    """The facts of a rank on which a key has another value; None takes it out."""
    config: RunConfig = tiny()
    launch, plain = Launch(WORLD, WORLD, True, 1, "no", None), dict(PLAIN)
    if key.startswith("config."):
        config = changed(config, key.removeprefix("config."), value)
    elif key.startswith("launch."):
        launch = dataclasses.replace(launch, **{key.removeprefix("launch."): value})
    elif value is None:
        del plain[key]
    else:
        plain[key] = value
    return facts_of(flatten(config), launch) | plain


def rank_main(folder: Path, rank: int) -> None:
    """All cases on one rank."""
    store, patience = f"file://{folder}/store", timedelta(minutes=20)
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=patience)
    workers = Workers(Launch(WORLD, WORLD, True, 1, "no", None), EngineConfig(), rank, WORLD, torch.device("cpu"))
    found, slowest = {}, 0.0
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        facts = facts_with(*((case["key"], case["value"]) if rank in case["ranks"] else ("count", 1)))
        began = time.monotonic()
        try:
            check_equal(facts, workers)
            found[name] = None
        except UserError as error:
            found[name] = str(error)
        slowest = max(slowest, time.monotonic() - began)
    (folder / f"result-{rank}.json").write_text(json.dumps(found))
    (folder / f"slowest-{rank}").write_text(f"{slowest:.3f}\n")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    """Forks a rank each; status 1 where one has failed."""
    sys.exit(fork_ranks(WORLD, partial(rank_main, folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
