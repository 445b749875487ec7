"""What all measurements share: their spread, what they were made with, and checks of their options."""

import platform
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from lgp_dist.errors import UserError
from lgp_dist.provenance import environment


def spread(values: Sequence[float]) -> float:
    """(Largest - smallest) / median of one number or more, rounded to 4 digits."""
    return round((max(values) - min(values)) / median(values), 4)


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command; of what computes on a device, its name and torch's threads too."""
    about = environment()
    machine = about["machine"] | {"platform": platform.platform()}
    if device is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        machine |= {"device": name, "threads": torch.get_num_threads()}
    return about | {"machine": machine}


def check_least(option: str, value: int, least: int) -> None:
    """Raises UserError where an option's number is below the least that it may be."""
    if value < least:
        raise UserError(f"{option} is {value}, but must be {least} or more: choose another value.")
