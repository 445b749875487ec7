"""Where kernels run: on which devices and dtypes, in Triton's interpreter, or not at all."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

if find_spec("triton"):
    from lgp_dist.ops import kernels
else:
    kernels = None

HALF = (torch.bfloat16, torch.float16)
TILE = 64
"""Rows of a GEMM's tile, and the most columns."""
PROGRAMS = 264
"""Programs of a backward kernel: a fixed number, so that the order of its sums does not depend on the card."""


def interpreted() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter."""
    return kernels is not None and kernels.INTERPRETED


@cache
def _capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


def runs(rows: Tensor) -> bool:
    """Whether kernels run on these rows: bf16 or fp16 on an NVIDIA GPU from Ampere on; interpreted, also float32."""
    if kernels is None:
        return False
    if interpreted():
        return rows.dtype in (torch.float32, *HALF)
    return rows.is_cuda and torch.version.hip is None and rows.dtype in HALF and _capable(rows.device.index or 0)


def power(number: int) -> int:
    """The largest power of 2 that divides a number."""
    return number & -number


def tiles(narrow: int, wide: int) -> tuple[int, int] | None:
    """Columns of a tile of W and of a chunk of X for these widths; None where the kernel does not support them."""
    chunk, columns = power(narrow) if narrow == 3 * power(narrow) else narrow, min(TILE, power(wide))
    fits = narrow in (chunk, 3 * chunk) and chunk == power(chunk) and 16 <= chunk <= 128 and columns >= 16
    return (columns, chunk) if fits else None


def launch(kernel: Any, programs: int) -> Any:
    """The kernel with a grid of `programs`, visible to torch.compile; torch before 2.13 wraps no interpreted kernel."""
    return (kernel if interpreted() else wrap_triton(kernel))[(programs,)]
