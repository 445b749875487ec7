"""The kernels on a GPU: results, compilation by Inductor, checkpointing and capture in a CUDA graph."""

import copy

import pytest
import torch
from numerics_cases import stock_vit
from torch import Tensor
from torch._dynamo.utils import counters

from lgp_dist.bench.op import Case, check
from lgp_dist.config.run_config import Ops
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.pool import LearngenePool
from lgp_dist.ops import device, dispatch
from lgp_dist.paths.stitched import PathSpace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPACE = PathSpace((192, 384), 2, image_size=224, patch_size=16, channels=3, num_classes=10)
SIZES = [(1, 192, 384), (197, 192, 768), (50, 32, 96), (399, 384, 768)]


@pytest.mark.parametrize(
    ("dtype", "size"), [("bf16", (25216, 192, 768)), *((dtype, size) for dtype in ("bf16", "fp32") for size in SIZES)]
)
@pytest.mark.parametrize("op", ["stitch_norm", "norm_residual"])
def test_equals_float64(op: str, dtype: str, size: tuple[int, int, int]) -> None:
    """y, z and every gradient; bf16 runs the kernels."""
    cuda = torch.device("cuda")
    assert device.runs(torch.empty(1, device=cuda, dtype=torch.bfloat16)) and device.tiles(*size[1:]) is not None
    check(Case(op, *size, dtype), cuda)


def run(ops: Ops, *, compiled: bool = False, checkpointed: bool = False) -> list[Tensor]:
    """Logits and gradients of a stitched path under autocast."""
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    pool = LearngenePool.empty(SPACE, (3, 6)).cuda()
    pool.set_ops(ops)
    pool.set_grad_checkpointing(checkpointed)
    for unit in pool.units.values():
        if compiled and hasattr(unit, "block"):
            unit.block.compile(fullgraph=True, dynamic=False)
    images = torch.randn(4, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        logits = pool(images, SPACE.paths[2])
    logits.float().square().sum().backward()
    assert not counters["graph_break"]
    return [logits.detach().float(), *(p.grad for p in pool.parameters() if p.grad is not None)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_pool_equals_timms_modules(compiled: bool, checkpointed: bool) -> None:
    """All numbers together within bf16's rounding, without graph breaks."""
    found, wanted = run("fused", compiled=compiled, checkpointed=checkpointed), run("reference")
    together = [torch.cat([part.flatten() for part in side]) for side in (found, wanted)]
    assert (together[0] - together[1]).norm() < 0.03 * together[1].norm()


def test_capture_in_a_graph() -> None:
    """A replay on other numbers gives what the operation gives."""
    x, y = (torch.randn(197, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight, bias = torch.randn(768, 192, device="cuda", dtype=torch.bfloat16), torch.randn(768, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        dispatch.stitch_norm(x, weight, bias, 1e-6, "fused")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = dispatch.stitch_norm(x, weight, bias, 1e-6, "fused")
    x.copy_(y)
    graph.replay()
    wanted = dispatch.stitch_norm(y, weight, bias, 1e-6, "fused")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_ancestry_as_a_graph() -> None:
    """Compiled with inductor and replayed, it answers as before, batch after batch, to rounding."""
    vit = stock_vit(32, 4, 4)
    plain, ready = (Ancestry(copy.deepcopy(vit)).cuda() for _ in range(2))
    ready.prepare("bf16", "inductor")
    for _ in range(4):
        images = torch.randn(3, 1, 28, 28, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            found, wanted = ready(images)[0], plain(images)[0]
        assert (found - wanted).norm() < 0.02 * wanted.norm()
