"""The frozen teacher, and pretrained models of timm."""

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import Precision
from lgp_dist.errors import UserError
from lgp_dist.models.vit import forward_with_taps, with_patch_product


class Ancestry(nn.Module):
    """A pretrained model that is never trained: always in eval mode, without gradients."""

    def __init__(self, vit: nn.Module):
        """vit: a plain ViT; any classifier of images where only its logits are asked for."""
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.own: dict[str, Any] | None = None
        self.train(False)

    def train(self, mode: bool = True) -> "Ancestry":
        """Stays in eval mode, whatever its surroundings do."""
        return super().train(False)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    def prepare(self, precision: Precision, backend: str = "") -> "Ancestry":
        """Forwards in this precision from now on, whatever surrounds them: the same bits as under autocast of it, if
        not compiled, for less.

        Weights that autocast would cast in every forward are cast once. backend: torch.compile's, for every block of a
        plain ViT; empty for none. On a GPU inductor makes the whole model a CUDA graph too, for logits alone.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.own = {"dtype": dtype, "enabled": dtype is not None, "cache_enabled": False}
        if dtype:
            for module in self.vit.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)
        for block in self.vit.blocks if backend and is_plain(self.vit) else ():
            block.compile(backend=backend, dynamic=False)
        if backend == "inductor" and next(self.vit.parameters()).is_cuda:
            self.vit.compile(mode="reduce-overhead", dynamic=False)
        return self

    def forward(
        self, images: Tensor, blocks: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """Logits [B, classes], and block and attention outputs [B, N, D] at the named blocks (from 0).

        Where no autocast surrounds it they are float32, whatever they were computed in.
        """
        kind = images.device.type
        with torch.autocast(kind, **self.own) if self.own else nullcontext():
            if blocks:
                with torch.no_grad():
                    logits, *taps = forward_with_taps(self.vit, images, blocks)
            else:
                with torch.inference_mode():
                    logits, taps = self.vit(images), ({}, {})
                logits = logits.clone()  # a tensor that backward may keep, not the graph's memory
        if not torch.is_autocast_enabled(kind):
            logits, *taps = logits.float(), *({at: tokens.float() for at, tokens in part.items()} for part in taps)
        return logits, *taps


def timm_model(
    name: str, key: str, plain: bool, *, image_size: int, channels: int, num_classes: int, patch_size: int
) -> nn.Module:
    """timm's model of that name for the run's input, with random weights.

    key: of the settings that name it. plain: whether it must be a plain ViT; then a UserError is raised where timm has
    no such ViT, or its patch size is another.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        raise UserError(f"{key}.model is {name!r}, which timm does not have: choose another{_like(near)}.")
    shape = {"in_chans": channels, "num_classes": num_classes}
    try:
        model = timm.create_model(name, img_size=image_size, **shape)
    except TypeError:  # it takes images of any size
        model = None if plain else timm.create_model(name, **shape)
    if plain and not (is_plain(model) and model.patch_embed.patch_size == (patch_size, patch_size)):
        raise UserError(
            f"{key}.model {name} is not a plain ViT with one class token and patch size {patch_size}: choose one, "
            "or set model.patch_size."
        )
    return with_patch_product(model) if is_plain(model) else model


def hub_weights(model: nn.Module, key: str = "ancestry") -> Path:
    """timm's pretrained weights of a model from the hub, as a local safetensors file; no other format is read.

    key: of the settings that name it. Raises UserError where timm has none or the hub cannot be reached.
    """
    name = model.pretrained_cfg.get("architecture", "the model")
    source = model.pretrained_cfg.get("hf_hub_id")
    elsewhere = f"download its safetensors file and pass --{key}.source file --{key}.weights FILE"
    if not source:
        raise UserError(f"timm has no pretrained weights of {name} on the hub: {elsewhere}.")
    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{source} could not be fetched from the hub ({reason}): connect, or {elsewhere}.") from None


def check_normalisation(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], what: str = "ancestry"
) -> None:
    """UserError where pretrained weights expect images normalised otherwise than the run does."""
    wanted = (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"]))
    if wanted != (tuple(mean), tuple(std)):
        raise UserError(
            f"The pretrained {what} expects mean {wanted[0]} and std {wanted[1]}, but data.mean is {mean} and "
            f"data.std {std}: set data.mean and data.std to what it expects."
        )


def is_plain(vit: object) -> bool:
    """Whether blocks can be tapped and tokens compared: timm's ViT and blocks, one class token, no registers."""
    return (
        type(vit) is VisionTransformer
        and all(type(block) is Block for block in vit.blocks)
        and vit.num_prefix_tokens == 1
        and vit.cls_token is not None
    )


def load_weights(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    what: str = "ancestry",
    settings: str = "ancestry.model, width, depth, heads and data.num_classes",
) -> None:
    """Loads tensors strictly; UserError naming the first that does not fit, and the settings that decide."""
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        ours = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        theirs = tuple(state[name].shape) if name in state else "no such tensor"
        if ours != theirs:
            raise UserError(
                f"{source} does not fit the recipe's {what}: {name} is {theirs} there and {ours} here; choose other "
                f"weights, or set {settings} to match."
            )
    module.load_state_dict(state, strict=True)


def _like(names: list[str]) -> str:
    return f", such as {', '.join(names)}" if names else ""
