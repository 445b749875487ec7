"""The patch embedding: timm's own in float32, one product of patches in bf16 and fp16, of the same tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp_dist.models.vit import build_vit

SHAPES = {"grey": (28, 7, 1), "colour": (32, 16, 3), "one patch": (16, 16, 3)}
"""Side of an image, side of a patch, channels."""
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def both(shape: tuple[int, int, int]) -> tuple[VisionTransformer, VisionTransformer, Tensor]:
    """timm's ViT, this project's from the same seed, and images."""
    side, patch, channels = shape
    torch.manual_seed(3)
    stock = VisionTransformer(
        img_size=side, patch_size=patch, in_chans=channels, num_classes=5, embed_dim=24, depth=2, num_heads=4
    )
    torch.manual_seed(3)
    ours = build_vit(image_size=side, patch_size=patch, channels=channels, num_classes=5, width=24, depth=2, heads=4)
    return stock, ours, torch.randn(3, channels, side, side)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_float32_it_is_timms(shape: tuple[int, int, int]) -> None:
    """The same random numbers, names, order, logits and gradients, bit for bit."""
    stock, ours, images = both(shape)
    wanted, found = stock.state_dict(), ours.state_dict()
    assert list(wanted) == list(found) and all(torch.equal(wanted[name], found[name]) for name in wanted)
    logits = [vit(images) for vit in (stock, ours)]
    assert torch.equal(*logits)
    for each in logits:
        each.square().sum().backward()
    for (name, one), (other, two) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other and torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cast", [False, True], ids=["autocast", "cast"])
def test_a_product_is_the_convolution(shape: tuple[int, int, int], dtype: torch.dtype, cast: bool) -> None:
    """Tokens and gradients are those of a convolution in float64, to the rounding of their parts and of the sum."""
    _, ours, images = both(shape)
    embedding = copy.deepcopy(ours.patch_embed).to(dtype) if cast else ours.patch_embed
    with torch.autocast("cpu", dtype, enabled=not cast, cache_enabled=False):
        tokens = embedding(images.to(dtype) if cast else images)
    assert tokens.dtype == dtype and tokens.is_contiguous()
    weight, bias = (part.detach().double().requires_grad_() for part in ours.patch_embed.proj.parameters())
    wanted = F.conv2d(images.double(), weight, bias, stride=shape[1]).flatten(2).transpose(1, 2)
    gradient = torch.randn(tokens.shape, dtype=torch.float64)
    tokens.backward(gradient.to(dtype))
    wanted.backward(gradient)
    projection = embedding.proj
    for found, exact in [(tokens, wanted), (projection.weight.grad, weight.grad), (projection.bias.grad, bias.grad)]:
        assert found.shape == exact.shape
        error = (found.double() - exact).norm() / exact.norm()
        assert error < 2 * ROUNDING[dtype], f"{float(error)}"


def test_no_convolution_is_made_in_bf16() -> None:
    """Counted by torch's profiler; in float32 there is one."""
    _, ours, images = both(SHAPES["colour"])
    for enabled in (True, False):
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ours.patch_embed(images).float().sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert ("aten::convolution" in names) != enabled
