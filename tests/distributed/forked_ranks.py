"""Ranks as forked processes, for workers that need no launcher."""

import os
from collections.abc import Callable


def fork_ranks(world: int, rank_main: Callable[[int], None]) -> int:
    """Calls `rank_main` in a process for each rank; 1 if one has failed."""
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 1
        try:
            rank_main(rank)
            status = 0
        finally:
            os._exit(status)
    return int(any(os.waitpid(pid, 0)[1] for pid in pids))
