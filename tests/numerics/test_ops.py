"""The fused operations against their definition in float64, on the CPU: torch's way through them, and the kernels."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import ops_aot
import ops_cases
import pytest
import torch
import torch.nn.functional as F
from ops_cases import DTYPES, EPS, LIMITS, NAMES, SIZES, distances, double, inputs, results
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lgp_dist.ops import device, dispatch, reference

EVERY = "LGP_KERNELS" in os.environ
"""All builds of the kernels, in place of one of each on every architecture."""
NORM = {"stitch_norm": torch.ops.lgp.stitch_norm.default, "norm_residual": torch.ops.lgp.norm_residual.default}
CASES = list(product(NAMES, SIZES, DTYPES))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Distances of the interpreted kernels, from a process of its own: what a kernel is, is decided at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    call = [sys.executable, ops_cases.__file__]
    done = subprocess.run(call, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "size", "precision"), CASES)
def test_equals_float64(name: str, size: tuple[int, int, int], precision: str) -> None:
    """y, z and every gradient, at odd sizes and with outlier channels."""
    assert max(distances(name, size, precision).values()) <= LIMITS[precision]


@pytest.mark.slow
def test_interpreted_kernels_equal_float64(interpreted: dict[str, dict[str, float]]) -> None:
    """The same of the kernels themselves, run by Triton's interpreter."""
    assert len(interpreted) == 14
    for case, found in interpreted.items():
        limit = next(limit for precision, limit in LIMITS.items() if precision in case)
        assert max(found.values()) <= limit, (case, found)
        assert {"y", "z"} < found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ops_aot.SHARED)
@pytest.mark.parametrize("build", ops_aot.BUILDS if EVERY else ops_aot.FEW, ids=lambda build: build.name)
def test_kernels_compile_without_spills(
    build: ops_aot.Build, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For Ampere, Hopper and Blackwell, by the real compiler, within their shared memory; GEMMs on tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    found = ops_aot.compiled(build, capability)
    assert found["spills"] == found["stack"] == 0, found
    assert 0 < found["shared"] <= ops_aot.SHARED[capability], found
    assert (found["products"] > 0) == build.kernel.startswith("stitch"), found


@pytest.mark.slow
def test_a_tile_too_large_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: rows of the backward tile times eight are more than the registers hold."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(ops_aot, "ROWS", 32)
    assert ops_aot.compiled(ops_aot.backward(768, affine=True), 90)["spills"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    """First derivatives by finite differences in float64."""
    leaves = double(inputs(name, 5, 6, 7, torch.float32))
    assert torch.autograd.gradcheck(lambda *tensors: getattr(dispatch, name)(*tensors, EPS, "fused"), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    """Schema (no output aliases another or an input), fake tensors, autograd's registration, tracing."""
    torch.library.opcheck(NORM[name], (*inputs(name, 5, 16, 32, torch.float32), EPS))


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck_of_the_backward(affine: bool) -> None:
    """The same of the norm's backward, without and with gamma."""
    y, z, gamma = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    _, _, mean, rstd = NORM["norm_residual"](y, z, gamma, gamma, EPS)
    given = (y, z, y, gamma, mean, rstd) if affine else (None, z, y, None, mean, rstd)
    torch.library.opcheck(torch.ops.lgp.norm_backward.default, given)


@pytest.mark.parametrize(("name", "used"), product(NAMES, ("y", "z")))
def test_one_output_is_enough(name: str, used: str) -> None:
    """Every parameter gets a gradient, zero where only the other output has it."""
    leaves = inputs(name, 9, 16, 32, torch.float32)
    exact = double(leaves)
    place = "yz".index(used)
    getattr(dispatch, name)(*leaves, EPS, "fused")[place].sin().sum().backward()
    getattr(reference, name)(*exact, EPS)[place].sin().sum().backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        grad = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-5, atol=1e-5)


def module(name: str, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The operation between others, on tokens [2, rows, width]."""
    first, *others = tokens
    y, z = getattr(dispatch, name)(first.sin(), *others, EPS, "fused")
    return y.cos(), z * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["checkpoint", "compile", "compiled checkpoint"])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_compilation_and_autocast(name: str, way: str, autocast: bool) -> None:
    """The same results and gradients as plain, in one graph without breaks."""
    torch.compiler.reset()
    counters.clear()

    def plain(*tokens: Tensor) -> tuple[Tensor, Tensor]:
        return module(name, list(tokens))

    def again(*tokens: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(plain, *tokens, use_reentrant=False)

    chosen = {"checkpoint": again, "compile": plain, "compiled checkpoint": again}[way]
    if way != "checkpoint":
        chosen = torch.compile(chosen, backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for function in (plain, chosen):
        leaves = inputs(name, 12, 16, 32, torch.float32)
        count = 1 if name == "stitch_norm" else 2
        batched = [leaf.detach().view(2, 6, -1).requires_grad_() for leaf in leaves[:count]]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = function(*batched, *leaves[count:])
        found.append(results(name, outputs, [*batched, *leaves[count:]]))
    assert not counters["graph_break"]
    for part, wanted in found[0].items():
        torch.testing.assert_close(found[1][part], wanted, rtol=1e-6, atol=1e-6)
    assert (found[0]["z"].dtype == torch.bfloat16) == (autocast and name == "stitch_norm")


@pytest.mark.slow
def test_inductor_takes_both() -> None:
    """One compiled function with both operations, against the definition."""
    torch.compiler.reset()

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y, z = dispatch.stitch_norm(x, weight, bias, EPS, "fused")
        return dispatch.norm_residual(F.gelu(z), y, bias.cos(), bias.sin(), EPS, "fused")

    leaves = inputs("stitch_norm", 12, 16, 32, torch.float32)
    exact = double(leaves)
    found = results("stitch_norm", torch.compile(block, fullgraph=True, dynamic=False)(*leaves), leaves)
    y, z = reference.stitch_norm(*exact, EPS)
    bias = exact[2]
    wanted = results("stitch_norm", reference.norm_residual(F.gelu(z), y, bias.cos(), bias.sin(), EPS), exact)
    for part, value in wanted.items():
        assert ops_cases.distance(found[part], value) <= LIMITS["fp32"]


@pytest.mark.slow
def test_modes() -> None:
    """Compiled is the reference compiled; auto is the reference on a card that no benchmark names, as is a CPU."""
    leaves = inputs("stitch_norm", 4, 16, 32, torch.float32)
    found = {mode: dispatch.stitch_norm(*leaves, EPS, mode) for mode in ("auto", "compiled", "fused", "reference")}
    assert torch.equal(found["auto"][1], found["reference"][1])
    assert all(ops_cases.distance(z, found["reference"][1]) <= 1e-6 for _, z in found.values())
    assert dispatch.resolved("auto", torch.device("cpu")) == "reference"


def test_widths_that_the_kernel_takes() -> None:
    """DeiT's and powers of two from 16; others take torch's way through the same operation."""
    assert [device.tiles(*widths) for widths in ((192, 768), (384, 768), (32, 96))] == [(64, 64), (64, 128), (32, 32)]
    assert [device.tiles(*widths) for widths in ((768, 1024), (100, 768), (192, 100), (8, 16))] == [None] * 4
