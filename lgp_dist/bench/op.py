"""The fused operations on this device: checked against float64, then compared in time with eager and compiled torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lgp_dist.bench.common import DTYPES, ceilings, check_least, facts, interleaved, spread
from lgp_dist.errors import UserError
from lgp_dist.ops import dispatch, reference

MODES = ("reference", "compiled", "fused")
LIMITS = {"fp32": 1e-6, "bf16": 4e-3}
"""Largest relative distance of y, z and every gradient from float64."""
CASES = (("stitch_norm", 192, 768), ("norm_residual", 192, 192), ("norm_residual", 768, 768))
"""Operations and their widths."""
MARKS = {("stitch_norm", "forward"): (0.60, 1.25), ("stitch_norm", "backward"): (0.60, 1.15)}
"""A fused operation passes on a GPU in bf16 at this share of the floor and this many times the speed of compiled."""
EPS = 1e-6
COLUMNS = (("op", "size", "dtype", "way", "mode", "us", "spread", "of_floor", "to_compiled", "passes"),)


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    op: str
    rows: int
    narrow: int
    wide: int
    dtype: str

    def leaves(self, device: torch.device) -> list[Tensor]:
        """Inputs, with an outlier channel."""
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device)

        if self.op == "stitch_norm":
            weight, bias = normal(self.wide, self.narrow) * self.narrow**-0.5, 0.2 * normal(self.wide)
            bias[5] += 8
            made = [normal(self.rows, self.narrow), weight, bias]
        else:
            gamma, beta = 1 + 0.1 * normal(self.wide), 0.1 * normal(self.wide)
            made = [normal(self.rows, self.wide), normal(self.rows, self.wide), gamma, beta]
        return [tensor.to(DTYPES[self.dtype]).requires_grad_() for tensor in made]

    def flops(self) -> dict[str, float]:
        """Of the matrix products: forward, backward."""
        product = 2.0 * self.rows * self.narrow * self.wide if self.op == "stitch_norm" else 0.0
        return {"forward": product, "backward": 2 * product}

    def floor(self, peak: float, bandwidth: float) -> dict[str, float]:
        """The least seconds possible: every input is read once, every output written once, all at the ceilings."""
        size, full = torch.empty((), dtype=DTYPES[self.dtype]).element_size(), self.rows * self.wide
        if self.op == "norm_residual":
            return {way: 4 * full * size / bandwidth for way in ("forward", "backward")}
        read, weight = self.rows * self.narrow, self.narrow * self.wide
        product = self.flops()["forward"] / peak
        forward = max(product, ((read + weight + 2 * full) * size + 8 * self.rows) / bandwidth)
        to_input = max(product, (full + weight + read) * size / bandwidth)
        to_weight = max(product, (full + read + weight) * size / bandwidth)
        return {"forward": forward, "backward": 4 * full * size / bandwidth + to_input + to_weight}


def bench_op(device: str = "auto", batch: int = 128, repeats: int = 20, tokens: int = 197) -> list[dict[str, Any]]:
    """One object for each operation, dtype, direction and way; ways take turns.

    us: median; spread: (most - least) / median; tflops: of the products; of_floor: floor over time; to_eager and
    to_compiled: how many times as fast as those; passes: whether it reaches its mark (fused, bf16, GPU), else null;
    ceiling: the highest TFLOP/s and TB/s measured on this device. Raises ArithmeticError where a result is too far from
    float64, and UserError where a number is below 1 or there is no GPU.
    """
    for option, value in (("--batch", batch), ("--repeats", repeats), ("--tokens", tokens)):
        check_least(option, value, 1)
    place, rows = _device(device), []
    for dtype in LIMITS:
        peak, bandwidth = ceilings(place, DTYPES[dtype])
        for op, narrow, wide in CASES:
            check(Case(op, 399, narrow, wide, dtype), place)
            case = Case(op, batch * tokens, narrow, wide, dtype)
            rows += [row | {"ceiling": [round(peak / 1e12, 3), round(bandwidth / 1e12, 4)]} for row in _timed(
                case, place, repeats, case.floor(peak, bandwidth)
            )]  # fmt: skip
    return [row | facts(place) for row in rows]


def _device(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("--device is cuda, but this machine shows no GPU: pass --device cpu.")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def check(case: Case, device: torch.device) -> float:
    """The largest relative distance of fused y, z and gradients from float64; ArithmeticError above the limit."""
    leaves = case.leaves(device)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outputs = getattr(dispatch, case.op)(*leaves, EPS, "fused")
    wanted = getattr(reference, case.op)(*exact, EPS)
    gradients = [torch.randn_like(part) for part in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]
    true = [*wanted, *torch.autograd.grad(wanted, exact, [part.double() for part in gradients])]
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found, true, strict=True)]
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    if not worst <= LIMITS[case.dtype]:
        raise ArithmeticError(f"{case} is {worst:.1e} from float64, above {LIMITS[case.dtype]:.0e}")
    return worst


def _timed(case: Case, device: torch.device, repeats: int, floor: dict[str, float]) -> list[dict[str, Any]]:
    torch.compiler.reset()
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    for mode in MODES:
        leaves = case.leaves(device)
        call = partial(getattr(dispatch, case.op), *leaves, EPS, mode)
        outputs = call()
        gradients = [torch.randn_like(part) for part in outputs]
        forward[mode] = torch.no_grad()(call)
        backward[mode] = partial(torch.autograd.grad, outputs, leaves, gradients, retain_graph=True)
    rows = []
    for way, calls in (("forward", forward), ("backward", backward)):
        seconds = interleaved(calls, device, repeats)
        rows += [_row(case, way, mode, seconds, floor[way], device) for mode in MODES]
    return rows


def _row(
    case: Case, way: str, mode: str, seconds: dict[str, list[float]], floor: float, device: torch.device
) -> dict[str, Any]:
    middle = {name: median(values) for name, values in seconds.items()}
    mine = middle[mode]
    ratios = {"of_floor": floor / mine, "to_eager": middle["reference"] / mine}
    ratios["to_compiled"] = middle["compiled"] / mine
    mark = MARKS.get((case.op, way)) if (mode, case.dtype, device.type) == ("fused", "bf16", "cuda") else None
    return {
        "op": case.op,
        "size": [case.rows, case.narrow, case.wide],
        "dtype": case.dtype,
        "way": way,
        "mode": mode,
        "us": round(1e6 * mine, 2),
        "spread": spread(seconds[mode]),
        "tflops": round(case.flops()[way] / mine / 1e12, 4),
        "floor_us": round(1e6 * floor, 2),
        **{name: round(value, 3) for name, value in ratios.items()},
        "passes": None if mark is None else ratios["of_floor"] >= mark[0] and ratios["to_compiled"] >= mark[1],
    }
