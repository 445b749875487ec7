"""A descendant, or a pool with all of its paths, in plain torch.

    from modeling_descendant import load  # needs config.json and model.safetensors

    model = load("FOLDER")
    logits = model(images)  # [B, C, H, W] float32, normalised with mean and std of pretrained_cfg in config.json

    from modeling_descendant import load_pool  # needs paths.json and model.safetensors

    pool = load_pool("FOLDER")
    pool.select(max_latency_ms=8)  # the most accurate path within the limits; loads nothing
    logits = pool(images)  # normalised with mean and std of pretrained_cfg in paths.json

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
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens + self.pos_embed


class Head(nn.Module):
    """Norm before or after pooling, class token or mean over patches, linear classifier."""

    def __init__(self, shape: dict[str, Any], width: int):
        super().__init__()
        self.first, self.mean = int(shape["class_token"]), shape["pool"] == "avg"
        self.norm = nn.LayerNorm(width, eps=EPS) if "norm" in shape["norms"] else nn.Identity()
        self.fc_norm = nn.LayerNorm(width, eps=EPS) if "fc_norm" in shape["norms"] else nn.Identity()
        self.head = nn.Linear(width, shape["num_classes"])

    def forward(self, tokens: Tensor, final_norm: bool) -> Tensor:
        """[B, N, D] to [B, classes]. final_norm: whether the first norm is applied."""
        tokens = self.norm(tokens) if final_norm else tokens
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
        self.final_norm = shape["final_norm"]
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
        return self.head(tokens, self.final_norm)


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


class PlainPool(nn.Module):
    """All paths of a pool, which share its weights. A forward runs the path that was selected last."""

    def __init__(self, table: dict[str, Any]):
        """table: of paths.json."""
        super().__init__()
        shape, rows = table["shape"], table["rows"]
        self.paths = {path["key"]: path for path in table["paths"]}
        self.stems = nn.ModuleList(Stem(shape, row["width"]) for row in rows)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(row["width"], row["heads"]) for _ in range(row["depth"])) for row in rows
        )
        self.stitches = nn.ModuleList(nn.Linear(*widths) for widths in table["stitch_widths"])
        self.heads = nn.ModuleList(Head(shape, row["width"]) for row in rows)
        self.select()

    def select(
        self, key: str = "", *, max_params: float = 0, max_flops: float = 0, max_latency_ms: float = 0
    ) -> dict[str, Any]:
        """Selects a path by its key or the most accurate one within limits, and returns its entry of paths.json.

        Ties go to the path with fewer FLOPs. KeyError for a key that the pool does not have, ValueError where no path
        is within the limits; the path selected before then stays.
        """
        given = {"params": max_params, "flops": max_flops, "latency_ms": max_latency_ms}
        limits = {field: limit for field, limit in given.items() if limit}
        if key and limits:
            raise ValueError("select takes a key or limits, not both.")
        paths = [self.paths[key]] if key else list(self.paths.values())
        fitting = [path for path in paths if all(path[field] <= limit for field, limit in limits.items())]
        if not fitting:
            least = ", ".join(f"{field} {min(path[field] for path in paths):g}" for field in limits)
            raise ValueError(f"No path is within {limits}; the least of all paths: {least}.")
        self.selected = max(fitting, key=lambda path: (path["top1"], -path["flops"]))
        return self.selected

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images to [B, classes] logits."""
        path = self.selected
        tokens = self.stems[path["segments"][0][0]](images)
        for number, (row, start, stop) in enumerate(path["segments"]):
            if number:
                tokens = self.stitches[path["stitches"][number - 1]](tokens)
            for block in range(start, stop):
                tokens = self.blocks[row][block](tokens)
        return self.heads[row](tokens, path["final_norm"])


def load_pool(folder: str | Path) -> PlainPool:
    """The pool of a folder with all paths, on the CPU, in eval mode, with the most accurate path selected."""
    pool = PlainPool(json.loads((Path(folder) / "paths.json").read_text()))
    pool.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=True)
    return pool.eval()
