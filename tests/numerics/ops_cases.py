"""Inputs of the fused operations, and their distance from the definition in float64.

Run as a script, with TRITON_INTERPRET=1, it prints the distances that the interpreted kernels have, as JSON.
"""

import json
import sys
from itertools import product

import torch
from torch import Tensor

from lgp_dist.ops import device, dispatch, reference

SIZES = ((1, 192, 384), (197, 192, 768), (50, 32, 96), (399, 384, 768))
"""Rows, and widths before and after the stitch: one token, an image, odd numbers that fill no tile."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1e-6, "bf16": 4e-3}
"""Relative: float32 has 24 bits and sums of some hundred terms; bf16 has 8, and a result is rounded once or twice."""
EPS = 1e-6
NAMES = {
    "stitch_norm": ("x", "weight", "bias"),
    "norm_residual": ("branch", "residual", "gamma", "beta"),
}


def inputs(name: str, rows: int, narrow: int, wide: int, dtype: torch.dtype) -> list[Tensor]:
    """Leaves with outlier channels, as a ViT's residual stream has; parameters of the norm and biases in float32."""
    draw = torch.Generator().manual_seed(rows + narrow + wide)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if name == "stitch_norm":
        x, weight, bias = normal(rows, narrow), normal(wide, narrow) * narrow**-0.5, 0.2 * normal(wide)
        x[:, 3] += 6
        bias[5] += 8
        made = (x.to(dtype), weight.to(dtype), bias)
    else:
        residual = normal(rows, wide)
        residual[:, 3] += 20
        norm = (1 + 0.1 * normal(wide), 0.1 * normal(wide))
        made = (normal(rows, wide).to(dtype), residual, *norm)
    return [tensor.requires_grad_() for tensor in made]


def double(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers as leaves in float64."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def results(name: str, outputs: tuple[Tensor, Tensor], leaves: list[Tensor]) -> dict[str, Tensor]:
    """y, z and the gradient of every leaf, for fixed gradients of y and z in bf16's precision."""
    draw = torch.Generator().manual_seed(7)
    gradients = [torch.randn(part.shape, generator=draw).bfloat16().to(part.dtype) for part in outputs]
    torch.autograd.backward(outputs, gradients)
    found = {leaf: tensor.grad for leaf, tensor in zip(NAMES[name], leaves, strict=True)}
    return {"y": outputs[0].detach(), "z": outputs[1].detach(), **found}


def distance(found: Tensor, exact: Tensor) -> float:
    """Of two tensors, relative to the second, by their Euclidean norms."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def distances(name: str, size: tuple[int, int, int], precision: str) -> dict[str, float]:
    """How far the fused operation is from the definition in float64: y, z and every gradient."""
    leaves = inputs(name, *size, DTYPES[precision])
    exact = double(leaves)
    found = results(name, getattr(dispatch, name)(*leaves, EPS, "fused"), leaves)
    wanted = results(name, getattr(reference, name)(*exact, EPS), exact)
    assert found.keys() == wanted.keys()
    return {part: distance(found[part], wanted[part]) for part in wanted}


def main() -> None:
    torch.set_num_threads(1)
    assert device.interpreted()
    rows = {}
    for name, size, precision in product(NAMES, SIZES, DTYPES):
        if size[0] > 300 and name == "norm_residual":  # half a minute of what the other sizes show
            continue
        rows[f"{name} {size} {precision}"] = distances(name, size, precision)
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main()
