"""`lgp` that notes what it hashes: a line `RANK PATH` in the file LGP_TEST_HASHES for each file but the package's own.

As `hashes_worker.py ranks FOLDER`: four ranks of two nodes, over gloo, that hash files and do work once per node.
FOLDER/result-R.json: what rank R got in each case, and in `hashed` which files it read.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_ranks import fork_ranks

from lgp_dist.config.run_config import EngineConfig
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.stages import start
from lgp_dist.stages.start import hashes_of

WORLD, NODE = 4, 2
PACKAGE = Path(start.__file__).absolute().parents[1]
FAILS = 2
"""The rank whose work fails in some cases: the first of the second node."""


def note_hashes(note: Callable[[str], None]) -> None:
    """Calls `note` with the path of every file that is hashed from now on."""
    digest = hashlib.file_digest

    def noting(file: Any, kind: str) -> Any:
        path = Path(file.name).absolute()
        if PACKAGE not in path.parents:
            note(str(path))
        return digest(file, kind)

    hashlib.file_digest = noting  # type: ignore[assignment]


def attempt(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call returns or raises."""
    try:
        return {"value": call()}
    except Exception as error:
        return {"error": type(error).__name__, "sentence": str(error)}


def rank_main(folder: Path, rank: int) -> None:
    """All cases on one rank."""
    store, patience = f"file://{folder}/store", timedelta(minutes=20)
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=patience)
    launch = Launch(WORLD, NODE, False, 0, "no", None)
    workers = Workers(launch, EngineConfig(), rank, WORLD, torch.device("cpu"))
    hashed: list[str] = []
    note_hashes(lambda path: hashed.append(Path(path).name))
    own = folder / ("a" if rank < WORLD - 1 else "b")

    def broken(error: Exception) -> int:
        if rank == FAILS:
            raise error
        return rank

    found = {
        "values": attempt(lambda: workers.gather({"rank": rank, "text": "ü" * rank})),
        "same": attempt(lambda: hashes_of({"x": folder / "a", "y": folder / "." / "a"}, workers)),
        "own": attempt(lambda: hashes_of({"x": own, "y": folder / "c"}, workers)),
        "none": attempt(lambda: hashes_of({}, workers)),
        "missing": attempt(lambda: hashes_of({"x": folder / ("a" if rank < NODE else "missing")}, workers)),
        "once": attempt(lambda: workers.once_per_node(lambda: rank)),
        "refused": attempt(lambda: workers.once_per_node(lambda: broken(UserError("No such weights.")))),
        "bug": attempt(lambda: workers.once_per_node(lambda: broken(KeyError("lost")))),
    }
    (folder / f"result-{rank}.json").write_text(json.dumps(found | {"hashed": hashed}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "ranks":
        sys.exit(fork_ranks(WORLD, partial(rank_main, Path(sys.argv[2]))))
    from lgp_dist.cli import main

    notes = os.open(os.environ["LGP_TEST_HASHES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    note_hashes(lambda path: os.write(notes, f"{os.environ['RANK']} {path}\n".encode()))
    main()
