"""timm's VisionTransformer: building it, tapping it, taking it apart. No attention or MLP is written here."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from lgp_dist.ops.dispatch import autocast_dtype


def build_vit(
    *,
    image_size: int,
    patch_size: int,
    channels: int,
    num_classes: int,
    width: int,
    depth: int,
    heads: int,
    drop_path: float = 0.0,
    class_token: bool = True,
) -> VisionTransformer:
    """A plain ViT with MLP ratio 4 and qkv bias: timm's class with DeiT's settings.

    class_token: without it, the mean of all tokens is normalised and classified.
    """
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        weight_init="skip" if torch.get_default_device().type == "meta" else "",  # it is slow there
    )
    return with_patch_product(vit)


class PatchProduct(nn.Conv2d):
    """A patch embedding's convolution, [B, C, H, W] to [B, D, H / p, W / p].

    In bf16 and fp16 it is one product of all patches. The output is then channels-last, which timm's PatchEmbed turns
    into tokens without a copy.
    """

    def forward(self, images: Tensor) -> Tensor:
        """H and W must be multiples of p, which timm's PatchEmbed sees to."""
        if autocast_dtype(self.weight) not in (torch.bfloat16, torch.float16):
            return super().forward(images)
        patches = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=self.kernel_size[0], q=self.kernel_size[1])
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def with_patch_product(vit: VisionTransformer) -> VisionTransformer:
    """Replaces a ViT's patch projection by a `PatchProduct` of the same tensors."""
    old = vit.patch_embed.proj
    new = skip_init(
        PatchProduct, old.in_channels, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None
    )
    new.weight, new.bias = old.weight, old.bias
    vit.patch_embed.proj = new
    return vit


def split_vit(vit: VisionTransformer) -> tuple[VisionTransformer, list[Block], VisionTransformer]:
    """Takes a ViT apart into stem, blocks and head, which own its tensors; the ViT cannot be used afterwards.

    Stem and head are timm's ViTs without each other's modules, so that embedding and pooling stay timm's code, and
    names in state dicts stay timm's.
    """
    blocks = list(vit.blocks)
    stem, head = vit, build_vit_like(vit)
    head.norm, head.fc_norm, head.head_drop, head.head = vit.norm, vit.fc_norm, vit.head_drop, vit.head
    head.patch_embed, head.cls_token, head.pos_embed = nn.Identity(), None, None
    stem.blocks, stem.norm, stem.fc_norm, stem.head = nn.Sequential(), nn.Identity(), nn.Identity(), nn.Identity()
    return stem, blocks, head


def build_vit_like(vit: VisionTransformer) -> VisionTransformer:
    """A ViT of the same input, width and classes without blocks."""
    return build_vit(
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        channels=vit.patch_embed.proj.in_channels,
        num_classes=vit.num_classes,
        width=vit.embed_dim,
        depth=0,
        heads=1,
        class_token=vit.cls_token is not None,
    )


def embed(stem: VisionTransformer, images: Tensor) -> Tensor:
    """[B, C, H, W] images to [B, N, D] tokens: patches, class token where there is one, positions."""
    tokens = stem.patch_embed(images)
    return stem.norm_pre(stem.patch_drop(stem._pos_embed(tokens)))


def classify(head: VisionTransformer, tokens: Tensor, norm: bool = True) -> Tensor:
    """[B, N, D] tokens to [B, classes] logits: final norm if `norm`, class token, linear head; without a class
    token the mean token, its norm and the head."""
    return head.forward_head(head.norm(tokens) if norm else tokens)


def block_with_attention(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A block's output and its attention module's output (after the projection, before the residual), both [B, N, D].

    The same three lines as timm's `Block.forward`, which has no way to return the second.
    """
    attention = block.attn(block.norm1(tokens))
    tokens = tokens + block.drop_path1(block.ls1(attention))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), attention


def forward_with_taps(
    vit: VisionTransformer, images: Tensor, blocks: Collection[int]
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Logits [B, classes], and at the named blocks (from 0) the block's and the attention's output [B, N, D]."""
    tokens, outputs, attentions = embed(vit, images), {}, {}
    for index, block in enumerate(vit.blocks):
        if index in blocks:
            tokens, attentions[index] = block_with_attention(block, tokens)
            outputs[index] = tokens
        elif vit.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False)
        else:
            tokens = block(tokens)
    return classify(vit, tokens), outputs, attentions
