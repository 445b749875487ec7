"""Prints what torch has on this machine as a JSON object; `lgp doctor` runs it as a separate process."""

import json
import sys

import torch


def backends() -> dict[str, str | list[str] | bool | None]:
    """Returns the CUDA version that torch was built for (or None), the names of its GPUs, NCCL's version, and gloo."""
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
