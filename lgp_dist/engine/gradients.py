"""Makes gradients whole on every rank when ranks train different paths.

ZeRO-1 reduces each rank's gradients by position, so a parameter that is missing on one rank would let the ranks add
gradients of different parameters. With a zero in its place every rank reduces the same sequence; the sum over ranks is
then what one process would compute that ran all the paths. A parameter that no rank used has a zero gradient, as is
DeepSpeed's habit: AdamW still applies its decay and its moments.
"""

import torch
from torch import nn


def fill_missing(module: nn.Module) -> None:
    """Gives every trained parameter a gradient before a backward: zeros where it has none."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
