"""A descendant in plain torch. It needs this file, config.json and model.safetensors.

    from modeling_descendant import load

    model = load("FOLDER")
    logits = model(images)  # [B, C, H, W] float32, normalised with mean and std of pretrained_cfg in config.json

Needs torch and safetensors, and no network.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

EPS = 1e-6
"""Of every LayerNorm."""


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=EPS), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=EPS), Mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Stem(nn.Module):
    """Patch embedding, class token, position embedding."""

    def __init__(self, shape: dict[str, Any], width: int):
        super().__init__()
        patch, count = shape["patch_size"], (shape["image_size"] // shape["patch_size"]) ** 2
        self.patch_embed = nn.ModuleDict()
        self.patch_embed["proj"] = nn.Conv2d(shape["channels"], width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if shape["class_token"] else None
        self.pos_embed = nn.Parameter(torch.zeros(1, count + shape["class_token"], width))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, N, D]."""
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + self.pos_embed


class Head(nn.Module):
    """Norm before or after pooling, class token or mean over patches, linear classifier."""

    def __init__(self, shape: dict[str, Any], width: int):
        super().__init__()
        self.first, self.mean, self.normed = int(shape["class_token"]), shape["pool"] == "avg", shape["final_norm"]
        self.norm = nn.LayerNorm(width, eps=EPS) if "norm" in shape["norms"] else nn.Identity()
        self.fc_norm = nn.LayerNorm(width, eps=EPS) if "fc_norm" in shape["norms"] else nn.Identity()
        self.head = nn.Linear(width, shape["num_classes"])

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to [B, classes]."""
        tokens = self.norm(tokens) if self.normed else tokens
        pooled = tokens[:, self.first :].mean(dim=1) if self.mean else tokens[:, 0]
        return self.head(self.fc_norm(pooled))


ORDER = ("low", "stitch", "high", "stitch_back", "back")
"""Names of the segments of blocks, and of the linear layers between them."""


class PlainDescendant(nn.Module):
    """Stem, blocks and head; a stitched path has linear layers into blocks of another width."""

    def __init__(self, shape: dict[str, Any]):
        """shape: lgp.shape of config.json."""
        super().__init__()
        segments = [(part["width"], part["heads"], part["depth"]) for part in shape["segments"]]
        self.stem, self.head = Stem(shape, segments[0][0]), Head(shape, segments[-1][0])
        self.order = ORDER[: 2 * len(segments) - 1]
        for number, (width, heads, depth) in enumerate(segments):
            self.add_module(ORDER[2 * number], nn.Sequential(*(Block(width, heads) for _ in range(depth))))
            if number:
                self.add_module(ORDER[2 * number - 1], nn.Linear(segments[number - 1][0], width))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images to [B, classes] logits."""
        tokens = self.stem(images)
        for name in self.order:
            tokens = self.get_submodule(name)(tokens)
        return self.head(tokens)


def renamed(name: str) -> str:
    """A tensor's name in this model, from its name in the file, where plain ViTs have timm's names."""
    first = name.split(".")[0]
    if first in ("patch_embed", "cls_token", "pos_embed"):
        return f"stem.{name}"
    if first == "blocks":
        return "low" + name.removeprefix("blocks")
    return f"head.{name}" if first in ("norm", "fc_norm") or name in ("head.weight", "head.bias") else name


def load(folder: str | Path) -> PlainDescendant:
    """The model of an exported folder, on the CPU, in eval mode."""
    shape = json.loads((Path(folder) / "config.json").read_text())["lgp"]["shape"]
    model = PlainDescendant(shape)
    tensors = load_file(Path(folder) / "model.safetensors")
    model.load_state_dict({renamed(name): tensor for name, tensor in tensors.items()}, strict=True)
    return model.eval()
