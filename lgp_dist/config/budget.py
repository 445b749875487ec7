"""What a descendant may cost, and amounts as people write them: 10M, 2G, 1.5e6."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from lgp_dist.errors import UserError

SUFFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
"""Letter -> what it multiplies by."""

_WRITTEN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKMGT]?)")


class Amount(float):
    """A number that the command line also takes with a suffix k, M, G or T."""


def parse_amount(text: str) -> Amount:
    """10M, 2G, 1.5e6 or 0.4 k as a number; UserError for anything else."""
    found = _WRITTEN.fullmatch(text.strip())
    value = float(found[1]) * SUFFIXES[found[2]] if found else math.nan
    if not math.isfinite(value):
        raise UserError(f"{text!r} is no amount: write a number such as 1500000, 1.5e6, 10M or 2G.")
    return Amount(value)


@dataclass(frozen=True)
class Budget:
    """Limits for `descend`; 0 for no limit. The best path that meets all of them is chosen."""

    max_params: Amount = Amount(0)
    """Parameters, all tensors counted, such as 10M."""
    max_flops: Amount = Amount(0)
    """Multiply-adds of one image, such as 2G."""
    max_latency_ms: float = 0.0
    """Median milliseconds of a batch on this machine, measured there and then."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where latency is measured."""
    batch: int = 1
    """Images of a batch whose latency is measured."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and images while latency is measured."""
