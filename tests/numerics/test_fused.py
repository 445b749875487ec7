"""The pool on fused operations against the same pool of timm's modules in float64."""

import copy
import subprocess
import sys
from itertools import product

import pytest
import torch
from numerics_cases import EVERY_PATH, HEADS, TWO, images, path_id, shake, stock_rows
from ops_cases import EPS, LIMITS, distance, double, inputs, results
from torch import Tensor
from torch._dynamo.utils import counters

from lgp_dist.config.run_config import Ops
from lgp_dist.models.descendant import descendant_from_path
from lgp_dist.models.pool import LearngenePool
from lgp_dist.ops import dispatch, reference
from lgp_dist.paths.path import Path
from lgp_dist.paths.stitched import PathSpace

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from lgp_dist.ops import device, dispatch
assert device.kernels is None
y, z = dispatch.stitch_norm(torch.randn(3, 16), torch.randn(32, 16), torch.zeros(32), 1e-6, "fused")
assert z.shape == (3, 32)
"""


def build(space: PathSpace) -> tuple[LearngenePool, LearngenePool]:
    """A pool with norms and biases away from their starts, and its copy in float64."""
    torch.manual_seed(1)
    pool = LearngenePool(space, stock_rows(space))
    shake(pool)
    return pool, copy.deepcopy(pool).double()


def run(pool: LearngenePool, path: Path, batch: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """Logits, and the gradients of all parameters that have one."""
    pool.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = pool(batch.to(pool.stem.rows[0].pos_embed.dtype), path)
    logits.to(torch.promote_types(logits.dtype, torch.float32)).square().sum().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in pool.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest distance; of gradients that are zero in exact arithmetic, as the key's bias has, an absolute one."""
    assert found.keys() == exact.keys()
    scale = max(float(value.norm()) for value in exact.values())
    return max(
        distance(found[name], value) if value.norm() > 1e-3 * scale else float(found[name].double().sub(value).norm())
        / scale for name, value in exact.items()
    )  # fmt: skip


def together(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The distance of all gradients as one vector."""
    found, exact = ({n: t.flatten().double() for n, t in side.items() if n != "logits"} for side in (found, exact))
    return distance(torch.cat([found[name] for name in exact]), torch.cat(list(exact.values())))


@pytest.mark.slow
@pytest.mark.parametrize(("space", "path"), EVERY_PATH, ids=path_id)
def test_every_path_equals_timms_modules(space: PathSpace, path: Path) -> None:
    """Logits and every gradient in fp32; all gradients together in bf16, as near as timm's modules are."""
    pool, exact = build(space)
    batch = images(2)
    wanted = run(exact, path, batch)
    rounded = run(pool, path, batch, autocast=True)
    pool.set_ops("fused")
    assert worst(run(pool, path, batch), wanted) < 5e-6
    assert together(run(pool, path, batch, autocast=True), wanted) < 2 * together(rounded, wanted) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ops", "checkpointed", "backend"),
    [*product(["fused"], [False, True], ["", "aot_eager"]), ("compiled", True, "")],
)
def test_checkpointing_and_compilation(ops: Ops, checkpointed: bool, backend: str) -> None:
    """The same gradients, in whole graphs, of which blocks of a width share one."""
    torch.compiler.reset()
    counters.clear()
    pool, exact = build(TWO)
    batch, path = images(2), TWO.paths[4]
    pool.set_ops(ops)
    pool.set_grad_checkpointing(checkpointed)
    for unit in pool.units.values():
        if backend and hasattr(unit, "block"):
            unit.block.compile(backend=backend, fullgraph=True, dynamic=False)
    assert worst(run(pool, path, batch), run(exact, path, batch)) < 5e-6
    assert not backend or counters["stats"]["unique_graphs"] == 3, counters["stats"]


def test_reference_is_how_a_pool_begins() -> None:
    """Back to it, logits are timm's bit for bit, and `auto` is no other on a CPU; weights keep timm's layout."""
    pool, _ = build(TWO)
    batch, path = images(2), TWO.paths[4]
    names, before = list(pool.state_dict()), pool(batch, path)
    pool.set_ops("fused")
    fused = pool(batch, path)
    assert list(pool.state_dict()) == names
    assert not torch.equal(before, fused) and distance(fused, before) < 1e-6
    assert torch.equal(descendant_from_path(pool.eval(), HEADS[TWO], path)(batch), before)
    for ops in ("reference", "auto"):
        pool.set_ops(ops)
        assert torch.equal(pool(batch, path), before)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["fused", "compiled", "reference"])
def test_rows_handed_on_give_the_pairs_gradients(mode: Ops, precision: str) -> None:
    """`stitch_rows` and `entered`, between which only y carries a gradient, are `stitch_norm`."""
    torch.compiler.reset()
    leaves = inputs("stitch_norm", 197, 32, 96, torch.float32 if precision == "fp32" else torch.bfloat16)
    exact = double(leaves)
    leaves[2] = leaves[2].detach().to(leaves[0].dtype).requires_grad_()
    exact[2] = leaves[2].detach().double().requires_grad_()
    y, *rows = dispatch.stitch_rows(*leaves[:3], EPS, mode)
    assert y.requires_grad and not any(part.requires_grad for part in rows)
    found = results("stitch_norm", dispatch.entered(y, *rows), leaves)
    wanted = results("stitch_norm", reference.stitch_norm(*exact, EPS), exact)
    assert max(distance(found[name], value) for name, value in wanted.items()) <= LIMITS[precision]


@pytest.mark.slow
def test_nothing_needs_triton_to_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
