"""Which path each rank trains in each micro-step: a pure function, the same before and after a restart."""

import hashlib
from dataclasses import dataclass

from lgp_dist.config import Policy
from lgp_dist.paths import Path


def draw_index(count: int, *key: int | str) -> int:
    """A uniform index below count that depends on the key alone.

    A 128-bit BLAKE2b digest of the key modulo count; the bias is below count / 2^128.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % count


@dataclass(frozen=True)
class PathSampler:
    """Draws paths; every path has the same long-run share on every rank.

    policy `independent`: each rank draws alone (SN-Net's and the paper's choice); `shared`: all ranks draw the same.
    """

    paths: tuple[Path, ...]
    policy: Policy
    seed: int

    def draw(self, step: int, micro_step: int, rank: int, world: int) -> Path:
        """The path of one rank in one micro-step.

        step: optimizer step, from 0. micro_step: 0 .. accumulate - 1. rank: 0 .. world - 1.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        who = "all" if self.policy == "shared" else rank
        return self.paths[draw_index(len(self.paths), "path", self.seed, step, micro_step, who)]
