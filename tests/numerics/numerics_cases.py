"""Small shapes, stock timm models and hooks that the numerical tests share. Nothing here calls `lgp_dist.models`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lgp_dist.paths.path import Path
from lgp_dist.paths.stitched import PathSpace

Array = NDArray[np.float64]

TWO = PathSpace((16, 32), 4, image_size=28, patch_size=7, channels=1, num_classes=10)
THREE = PathSpace((16, 32, 48), 3, image_size=28, patch_size=7, channels=1, num_classes=10)
ONE = PathSpace((16,), 3, image_size=28, patch_size=7, channels=1, num_classes=10)
BARE = replace(THREE, final_norm=False)
OWN = replace(THREE, stitch_sharing="path")
UNEQUAL = replace(TWO, depth=2, row_depths=(2, 6))
BOTH_WAYS = replace(TWO, depth=3, row_depths=(3, 6), two_way=True)
HEADS = {**dict.fromkeys((THREE, BARE, OWN), (1, 2, 4)), **dict.fromkeys((TWO, UNEQUAL, BOTH_WAYS), (2, 4)), ONE: (2,)}
"""Heads are no fixed share of the width, so that a wrong number of heads changes the logits."""
SPACES = [TWO, THREE, ONE, BARE, OWN, UNEQUAL, BOTH_WAYS]
EVERY_PATH = [(space, path) for space in SPACES for path in space.paths]


def path_id(value: object) -> str | None:
    """Names test cases after rows and path."""
    if isinstance(value, PathSpace):
        return f"{len(value.widths)}rows{'' if value.final_norm else '-bare'}{'-both-ways' if value.two_way else ''}"
    return value.key if isinstance(value, Path) else None


def stock_vit(width: int, depth: int, heads: int, drop_path: float = 0.0, **more: Any) -> VisionTransformer:
    """timm's ViT for 28 x 28 grey images and 10 classes, in eval mode, no parameter at a special value.

    more: of timm's arguments.
    """
    vit = VisionTransformer(
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        **more,
    )
    shake(vit)
    return vit.eval()


def stock_rows(space: PathSpace) -> list[VisionTransformer]:
    """A stock ViT for every row of a space."""
    return [stock_vit(*shape) for shape in zip(space.widths, space.depths, HEADS[space], strict=True)]


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Adds noise to every parameter, so that biases are not zero and norms are not one."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def images(count: int) -> Tensor:
    """Random images [B, 1, 28, 28]."""
    return torch.randn(count, 1, 28, 28)


@dataclass(frozen=True)
class Captured:
    """What hooks on a stock ViT saw in one forward, in float64."""

    logits: Array
    """[B, classes]."""
    inputs: dict[int, Array]
    """What each block was fed, [B, N, D]."""
    blocks: dict[int, Array]
    """What each block gave."""
    attentions: dict[int, Array]
    """What each block's attention module gave."""


@torch.no_grad()
def capture(vit: VisionTransformer, batch: Tensor) -> Captured:
    """Runs a stock ViT with hooks on all of its blocks and attention modules."""
    seen = Captured(np.empty(0), {}, {}, {})

    def note(store: dict[int, Array], index: int):
        return lambda module, arguments, output: store.__setitem__(index, array(output))

    handles = []
    for index, block in enumerate(vit.blocks):
        handles.append(
            block.register_forward_pre_hook(lambda m, args, i=index: seen.inputs.__setitem__(i, array(args[0])))
        )
        handles.append(block.register_forward_hook(note(seen.blocks, index)))
        handles.append(block.attn.register_forward_hook(note(seen.attentions, index)))
    logits = vit(batch)
    for handle in handles:
        handle.remove()
    return Captured(array(logits), seen.inputs, seen.blocks, seen.attentions)


def array(tensor: Tensor) -> Array:
    """A tensor as float64 NumPy array."""
    return tensor.detach().double().numpy().copy()


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def label_loss(logits: Array, targets: Array) -> float:
    """Cross-entropy, mean over the batch; targets [B] labels or [B, classes] shares."""
    shares = np.eye(logits.shape[1])[targets.astype(int)] if targets.ndim == 1 else targets
    return float(-(shares * log_softmax(logits)).sum() / len(logits))


def soft_loss(teacher: Array, logits: Array, tau: float, scale: str) -> float:
    """METHOD's L_pred; `paper` divides by the number of classes too."""
    total = -(np.exp(log_softmax(teacher / tau)) * log_softmax(logits / tau)).sum()
    return float(total / len(logits) / (logits.shape[1] if scale == "paper" else 1))


@contextmanager
def layer_norm_elements(module: nn.Module) -> Iterator[list[int]]:
    """Numbers of output elements of every LayerNorm that runs inside."""
    seen: list[int] = []
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    handles = [norm.register_forward_hook(lambda m, args, out: seen.append(out.numel())) for norm in norms]
    yield seen
    for handle in handles:
        handle.remove()


def count(module: nn.Module, without: tuple[str, ...] = ()) -> int:
    """Elements of all parameters whose last name is not left out."""
    return sum(p.numel() for name, p in module.named_parameters() if name.split(".")[-1] not in without)


def counted_flops(module: nn.Module, batch: torch.Tensor) -> float:
    """Multiply-adds as torch counts them (it counts 2 for each), plus 5 per LayerNorm output element."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), layer_norm_elements(module) as elements:
        module.eval()(batch)
    assert elements, "no LayerNorm ran"
    return counter.get_total_flops() / 2 + 5 * sum(elements)
