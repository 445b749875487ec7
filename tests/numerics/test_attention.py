"""Which attention models get, and that both are the same attention."""

from collections.abc import Iterator

import pytest
import torch
from timm.models.vision_transformer import Block

from lgp_dist.engine.workers import autocast, choose_attention


@pytest.fixture(autouse=True)
def chosen_again() -> Iterator[None]:
    yield
    choose_attention("cpu", "fp32")


@pytest.mark.parametrize(("device", "precision", "fused"), [
    ("cpu", "fp32", True), ("cpu", "bf16", False), ("cpu", "fp16", False),
    ("cuda", "fp32", True), ("cuda", "bf16", True),
])  # fmt: skip
def test_fused_kernel_but_where_it_is_slow(device: str, precision: str, fused: bool) -> None:
    choose_attention(device, precision)
    assert bool(Block(32, 2).attn.fused_attn) is fused


def test_both_are_the_same_attention() -> None:
    """Output and all gradients of a block in bf16, both ways, against float64: within twice the spacing of bf16."""
    torch.manual_seed(0)
    exact = Block(32, 2, qkv_bias=True).double()
    x, d = torch.randn(2, 3, 17, 32, dtype=torch.float64).unbind()
    for device in ("cpu", "cuda"):  # by products, by torch's kernel
        choose_attention(device, "bf16")
        block = Block(32, 2, qkv_bias=True)
        block.load_state_dict(exact.state_dict())
        images, found = x.float().requires_grad_(), []
        with autocast("cpu", "bf16"):
            y = block(images)
        found = [y, *torch.autograd.grad(y, [images, *block.parameters()], d.float())]
        inputs = x.clone().requires_grad_()
        y = exact(inputs)
        wanted = [y, *torch.autograd.grad(y, [inputs, *exact.parameters()], d)]
        for mine, right in zip(found, wanted, strict=True):
            assert (mine.double() - right).norm() <= 2**-7 * right.norm()
