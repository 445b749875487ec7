"""Limits on a descendant, and amounts as people write them: 10M, 2G, 1.5e6."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from lgp_dist.errors import UserError

SUFFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
"""Suffix -> factor."""

_WRITTEN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKMGT]?)")


class Amount(float):
    """A number that the command line also takes with a suffix k, M, G or T."""


def parse_amount(text: str) -> Amount:
    """The number that 10M, 2G, 1.5e6 or 0.4 k stands for; UserError for anything else."""
    found = _WRITTEN.fullmatch(text.strip())
    value = float(found[1]) * SUFFIXES[found[2]] if found else math.nan
    if not math.isfinite(value):
        raise UserError(f"{text!r} is no amount: write a number such as 1500000, 1.5e6, 10M or 2G.")
    return Amount(value)


@dataclass(frozen=True)
class Budget:
    """Limits of stage descend, which chooses the best path within all of them; 0 for none."""

    max_params: Amount = Amount(0)
    """Largest number of parameters, all tensors counted, such as 10M."""
    max_flops: Amount = Amount(0)
    """Most multiply-adds per image, such as 2G."""
    max_latency_ms: float = 0.0
    """Longest median latency of a batch, milliseconds, measured on this machine when it is needed."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device on which latency is measured."""
    batch: int = 1
    """Images per batch while latency is measured."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and images while latency is measured."""
