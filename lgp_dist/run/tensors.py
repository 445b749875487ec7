"""Tensors in safetensors files; apart from artifacts.py, which the command line reads before torch is imported."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from lgp_dist.errors import UserError

PICKLES = (b"PK\x03\x04", b"\x80\x02")
"""How files of torch.save begin: a zip archive, or a pickle in the older format."""


def load_tensors(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file by name; UserError where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a safetensors file that can.") from None
    try:
        return load(content)
    except SafetensorError as error:
        if content.startswith(PICKLES):
            raise UserError(
                f"{path} is a pickle of PyTorch, which is not opened, since it may run code. If you trust it, convert "
                "it: import torch, safetensors.torch; safetensors.torch.save_file(torch.load(FILE, map_location='cpu', "
                "weights_only=True), 'weights.safetensors')."
            ) from None
        raise UserError(f"{path} is not a whole safetensors file ({error}): name another, or make it again.") from None


def save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Writes tensors as safetensors."""
    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
