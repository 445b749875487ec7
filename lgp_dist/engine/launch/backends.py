"""What torch has on this machine, as one JSON object; `lgp doctor` runs it as a process of its own."""

import json
import sys
from typing import Any

import torch


def backends() -> dict[str, Any]:
    """CUDA that torch was built for (None without), names of the GPUs that it sees, NCCL's version, gloo."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "cuda": torch.version.cuda,
        "devices": devices,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl and devices else None,
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(backends()) + "\n")
