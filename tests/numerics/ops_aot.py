"""Compiles the kernels ahead of time, without a GPU, and reads what they take from the machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgp_dist.ops import kernels
from lgp_dist.ops.device import TILE, tiles
from lgp_dist.ops.norm_residual import OPTIONS, ROWS
from lgp_dist.ops.stitch_norm import options

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability."""
HALF, FULL = "*bf16", "*fp32"


@dataclass(frozen=True)
class Build:
    """A kernel with dtypes of its pointers and its constants."""

    kernel: str
    signature: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel and its widths."""
        constants = dict(self.constants)
        return "-".join(
            [self.kernel, *(f"{name}{constants[name]}" for name in ("K", "N", "AFFINE") if name in constants)]
        )


def stitch(narrow: int, wide: int) -> Build:
    """The stitch's kernel for bf16 tokens."""
    columns, chunk = tiles(narrow, wide)
    given = {"K": narrow, "N": wide, "BM": TILE, "BN": columns, "BK": chunk}
    types = (HALF, HALF, FULL, HALF, HALF, FULL, FULL, "i32", "fp32")
    return Build("stitch_norm_forward", types, tuple(given.items()), tuple(options(narrow).items()))


def residual(width: int) -> Build:
    """The residual's kernel for a bf16 branch and a float32 stream."""
    given = {"N": width, "NP": 1 << (width - 1).bit_length(), "BM": ROWS}
    types = (HALF, FULL, FULL, FULL, FULL, HALF, FULL, FULL, "i32", "fp32")
    return Build("norm_residual_forward", types, tuple(given.items()), tuple(OPTIONS.items()))


def backward(width: int, affine: bool) -> Build:
    """The backward kernel: after a stitch without, in a block with gamma and beta."""
    given = {"N": width, "NP": 1 << (width - 1).bit_length(), "BM": ROWS, "HAS_DY": True, "AFFINE": affine}
    stream = FULL if affine else HALF
    types = (stream, HALF, stream, FULL, FULL, FULL, stream, FULL, "i32", "i32")
    return Build("norm_backward", types, tuple(given.items()), tuple(OPTIONS.items()))


def compiled(build: Build, capability: int) -> dict[str, int]:
    """Registers, bytes of stack, loads and stores of local memory (spills), bytes of shared memory, and
    instructions of the tensor cores."""
    kernel, constants = getattr(kernels, build.kernel), dict(build.constants)
    names = [name for name in kernel.arg_names if name not in constants]
    types = dict(zip(names, build.signature, strict=True))
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Aligned as torch allocates: loads would be scalar without it.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if "*" in signature[name]
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(build.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (_run(*tool, file.name) for tool in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")))
    registers, stack, local = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    products = len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", code))
    found = {"registers": registers, "stack": stack + local, "spills": spills}
    return found | {"shared": built.metadata.shared, "products": products}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


BUILDS = [
    *(stitch(*widths) for widths in ((192, 768), (192, 384), (384, 768), (32, 96))),
    *(residual(width) for width in (192, 768)),
    *(backward(width, affine) for width in (192, 768) for affine in (False, True)),
]
"""Every width that the recipes have."""

FEW = [stitch(192, 768), stitch(384, 768), residual(768), backward(768, affine=True)]
"""The largest of each kernel."""
