"""The frozen teacher, and pretrained models of timm."""

import logging
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

log = logging.getLogger("lgp")


class Ancestry(nn.Module):
    """A pretrained model that is never trained: always in eval mode, without gradients."""

    def __init__(self, vit: nn.Module):
        """vit: a plain ViT, or any image classifier if only its logits are used."""
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.autocast: dict[str, Any] | None = None
        self.train(False)

    def train(self, mode: bool = True) -> "Ancestry":
        """Stays in eval mode, whatever the mode."""
        return super().train(False)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    def prepare(self, precision: Precision, backend: str = "") -> "Ancestry":
        """Makes forwards compute in this precision, whatever autocast surrounds them.

        The weights that autocast would cast in every forward are cast once. Results have the same bits as under
        autocast, unless blocks are compiled. backend: of torch.compile, for every block of a plain ViT; empty for none.
        On a GPU, inductor also makes the model a CUDA graph, which serves forwards for logits alone.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.autocast = {"dtype": dtype, "enabled": dtype is not None, "cache_enabled": False}
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
        """Logits [B, classes], and block and attention outputs [B, N, D] of the named blocks (from 0).

        They are float32 if no autocast surrounds the call.
        """
        kind = images.device.type
        with torch.autocast(kind, **self.autocast) if self.autocast else nullcontext():
            if blocks:
                with torch.no_grad():
                    logits, *taps = forward_with_taps(self.vit, images, blocks)
            else:
                with torch.inference_mode():
                    logits, taps = self.vit(images), ({}, {})
                # The next replay overwrites a CUDA graph's outputs, and autograd cannot save inference tensors.
                logits = logits.clone()
        if not torch.is_autocast_enabled(kind):
            logits, *taps = logits.float(), *({at: tokens.float() for at, tokens in part.items()} for part in taps)
        return logits, *taps


def timm_model(
    name: str, key: str, plain: bool, *, image_size: int, channels: int, num_classes: int, patch_size: int
) -> nn.Module:
    """timm's model of that name for the run's input, with random weights.

    key: the setting's, for messages. plain: whether it must be a plain ViT. UserError where timm has no such model, or
    it is not plain or its patch size differs.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        raise UserError(f"{key}.model is {name!r}, which timm does not have: choose another{_like(near)}.")
    shape = {"in_chans": channels, "num_classes": num_classes}
    try:
        model = timm.create_model(name, img_size=image_size, **shape)
    except TypeError:  # a model for images of any size
        model = None if plain else timm.create_model(name, **shape)
    if plain and not (is_plain(model) and model.patch_embed.patch_size == (patch_size, patch_size)):
        raise UserError(
            f"{key}.model {name} is not a plain ViT with one class token and patch size {patch_size}: choose one, "
            "or set model.patch_size."
        )
    return with_patch_product(model) if is_plain(model) else model


def hub_weights(model: nn.Module, key: str = "ancestry") -> Path:
    """Path of timm's pretrained weights of a model, fetched from the hub: a safetensors file, never a pickle.

    key: the setting's, for messages. UserError where timm has none or the hub cannot be reached.
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
    """UserError where pretrained weights expect images of another mean or std than the run's."""
    wanted = (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"]))
    if wanted != (tuple(mean), tuple(std)):
        raise UserError(
            f"The pretrained {what} expects mean {wanted[0]} and std {wanted[1]}, but data.mean is {mean} and "
            f"data.std {std}: set data.mean and data.std to what it expects."
        )


def is_plain(vit: object) -> bool:
    """Whether it is timm's plain ViT with timm's blocks, one class token and no registers.

    Only the blocks of such a model can be read, and only its tokens can be compared with a row's.
    """
    return (
        type(vit) is VisionTransformer
        and all(type(block) is Block for block in vit.blocks)
        and vit.num_prefix_tokens == 1
        and vit.cls_token is not None
    )


WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before all names."""


def load_weights(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    what: str = "ancestry",
    settings: str = "ancestry.model, width, depth, heads and data.num_classes",
) -> None:
    """Loads tensors strictly; UserError with the first that does not fit and the settings that decide.

    Names may have the prefixes of WRAPPERS. source, what, settings: for the message.
    """
    wanted = module.state_dict()
    while prefix := next((each for each in WRAPPERS if state and all(name.startswith(each) for name in state)), ""):
        log.info("%s: the prefix %s of all its names is left out", source, prefix)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source} has values in {name} that are not finite: name other weights.")
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
