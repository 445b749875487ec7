"""The frozen teacher, and pretrained models of timm."""

import contextlib
import logging
import sys
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from timm.models import adapt_input_conv
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import Precision
from lgp_dist.errors import UserError, first_line
from lgp_dist.models.ancestry_adapter import TokenAdapter, has_token_blocks, tap
from lgp_dist.models.vit import forward_with_taps, with_patch_product

log = logging.getLogger("lgp")


class Ancestry(nn.Module):
    """A pretrained model that is never trained: always in eval mode, without gradients."""

    def __init__(
        self,
        vit: nn.Module,
        images: nn.Module | None = None,
        tokens: TokenAdapter | None = None,
        classifies: bool = True,
    ):
        """vit: any image classifier of timm if only its logits are used, else one with blocks over a grid of tokens.

        images, tokens: None where it takes the run's images, and has the rows' tokens. classifies: whether its output
        is logits of the run's classes.
        """
        super().__init__()
        self.vit, self.plain = vit.requires_grad_(False), is_plain(vit)
        self.images, self.tokens, self.classifies = images, tokens, classifies
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
        for block in self.vit.blocks if backend and self.plain else ():
            block.compile(backend=backend, dynamic=False)
        if backend == "inductor" and next(self.vit.parameters()).is_cuda:
            self.vit.compile(mode="reduce-overhead", dynamic=False)
        return self

    def forward(
        self, images: Tensor, blocks: Collection[int] = ()
    ) -> tuple[Tensor | None, dict[int, Tensor], dict[int, Tensor]]:
        """Logits [B, classes], None if it does not classify; block and attention outputs [B, N, D] of the named blocks.

        Blocks count from 0. N are the rows' tokens. Outputs are float32 if no autocast surrounds the call.
        """
        kind = images.device.type
        with torch.autocast(kind, **self.autocast) if self.autocast else nullcontext():
            if blocks:
                with torch.no_grad():
                    logits, *taps = self._tap(self._adapted(images), blocks)
            else:
                with torch.inference_mode():
                    logits, taps = self.vit(self._adapted(images)), ({}, {})
                # The next replay overwrites a CUDA graph's outputs, and autograd cannot save inference tensors.
                logits = logits.clone()
        if not torch.is_autocast_enabled(kind):
            logits, *taps = logits.float(), *({at: tokens.float() for at, tokens in part.items()} for part in taps)
        return logits if self.classifies else None, *taps

    def features(self, images: Tensor) -> Tensor:
        """What its classifier reads, [B, F] float32."""
        with torch.no_grad():
            features = self.vit.forward_features(self._adapted(images))
            return self.vit.forward_head(features, pre_logits=True).float()

    def _adapted(self, images: Tensor) -> Tensor:
        return images if self.images is None else self.images(images)

    def _tap(self, images: Tensor, blocks: Collection[int]) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """Output, and block and attention outputs with the rows' tokens."""
        logits, *taps = (forward_with_taps if self.plain else tap)(self.vit, images, blocks)
        if self.tokens is not None:
            taps = [{at: self.tokens(tokens) for at, tokens in part.items()} for part in taps]
        return logits, *taps


Needs = Literal["row", "plain", "tokens", "logits"]
"""What is used of a model of timm: its weights as a row's; as a plain ViT's; its blocks' tokens; its logits alone."""


def timm_model(
    name: str, key: str, needs: Needs, *, image_size: int, channels: int, num_classes: int, patch_size: int
) -> nn.Module:
    """timm's model of that name for the run's input, with random weights.

    key: the setting's, for messages. patch_size: a row's, or what a plain ViT must have. UserError where timm has no
    such model, or it has not what is needed of it.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        raise UserError(f"{key}.model is {name!r}, which timm does not have: choose another{_like(near)}.")
    shape = {"in_chans": channels, "num_classes": num_classes}
    if needs == "row":
        shape["patch_size"] = patch_size
    try:
        model = timm.create_model(name, img_size=image_size, **shape)
    except TypeError:  # a model for images of any size
        model = timm.create_model(name, **shape) if needs == "logits" else None
    except (RuntimeError, AssertionError, ValueError) as error:  # timm's for a tag or size that it does not have
        reason = str(error).rstrip(".")
        raise UserError(
            f"{key}.model {name} cannot be built for images of {image_size} pixels ({reason}): choose another, or set "
            "ancestry.image_size."
        ) from error
    if needs in ("row", "plain") and not (is_plain(model) and model.patch_embed.patch_size == (patch_size, patch_size)):
        raise UserError(
            f"{key}.model {name} is not a plain ViT with one class token and patch size {patch_size}, whose weights "
            f"rows could take: choose one{_or_learn(key)}."
        )
    if needs == "tokens" and not has_token_blocks(model):
        raise UserError(
            f"{key}.model {name} has no blocks of attention over one square grid of tokens: choose a ViT, or let "
            "it teach by its logits alone, with a head, levels of all rows none and finetune.feature_weight 0."
        )
    patch = model.patch_embed.patch_size[0] if has_token_blocks(model) else 1
    if image_size % patch or (needs == "tokens" and image_size == patch):
        raise UserError(
            f"{key}.model {name} has patches of {patch} pixels, which do not make a grid of its images of "
            f"{image_size}: set ancestry.image_size to {max(2, round(image_size / patch)) * patch}."
        )
    return with_patch_product(model) if is_plain(model) else model


def _or_learn(key: str) -> str:
    return ", set model.patch_size, or start of all rows to random" if key == "ancestry" else ", or another source"


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
        reason = first_line(error)
        raise UserError(f"{source} could not be fetched from the hub ({reason}): connect, or {elsewhere}.") from None


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


def adapted_weights(model: nn.Module, state: dict[str, Tensor], head: bool) -> dict[str, Tensor]:
    """Pretrained weights for a model of timm with another input size, patch size or channels, as timm adapts them.

    head: whether they include the classifier; otherwise the model's own stays.
    """
    state, own = without_wrappers(state, "weights"), model.state_dict()
    config = getattr(model, "pretrained_cfg", None) or {}
    classifiers = config.get("classifier", "head") or "head"
    parts = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    if not head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(parts)}
        state |= {name: tensor for name, tensor in own.items() if name.startswith(parts)}
    if {name: tensor.shape for name, tensor in state.items()} == {name: each.shape for name, each in own.items()}:
        return state
    if to_timm := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None):
        with contextlib.suppress(RuntimeError):  # what timm cannot adapt does not fit: `load_weights` says so
            state = to_timm(state, model)
    first = f"{config.get('first_conv', 'patch_embed.proj')}.weight"
    if first in state and first in own and state[first].shape[1] != own[first].shape[1]:
        state[first] = adapt_input_conv(own[first].shape[1], state[first])
    return state


WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before all names."""


def without_wrappers(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors without the prefixes of WRAPPERS that all their names have. source: for the log."""
    while prefix := next((each for each in WRAPPERS if state and all(name.startswith(each) for name in state)), ""):
        log.info("%s: the prefix %s of all its names is left out", source, prefix)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_weights(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    what: str = "ancestry",
    settings: str = "ancestry.model, width, depth, heads, head and data.num_classes",
) -> None:
    """Loads tensors strictly; UserError with the first that does not fit and the settings that decide.

    Names may have the prefixes of WRAPPERS. source, what, settings: for the message.
    """
    wanted, state = module.state_dict(), without_wrappers(state, source)
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
