"""Run by `accelerate launch`: DeepSpeed's defects on DeepSpeed alone, without and with this project's way round.

Argument: the output folder, for results.json.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lgp_dist.engine.deepspeed_workarounds import forget_gradients, make_whole, skip_operator_probes


class Two(nn.Module):
    """Two layers of which a forward uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, which: str) -> Tensor:
        return getattr(self, which)(x).square().mean()


def settings(stage: int, *, offload: bool = False, universal: bool = False) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
    }


def weight(layer: nn.Linear, stage: int) -> Tensor:
    with deepspeed.zero.GatheredParameters([layer.weight], enabled=stage == 3):
        return layer.weight.detach().clone()


def stale(stage: int, *, offload: bool, fixed: bool) -> list[float]:
    """How far b moves in four steps of SGD that use a, b, a, b."""
    torch.manual_seed(0)
    module, moved = Two(), []
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.SGD(module.parameters(), lr=1.0), config=settings(stage, offload=offload)
    )
    for which in "abab":
        before = weight(module.b, stage)
        engine.backward(engine(torch.ones(2, 4), which))
        engine.step()
        if fixed:
            forget_gradients(engine)
        moved.append(float((weight(module.b, stage) - before).abs().max()))
    engine.destroy()
    return moved


def partitioned(*, fixed: bool) -> list[int]:
    """Sizes of ZeRO-3's weights after DeepSpeed is done with the module."""
    torch.manual_seed(0)
    module = Two()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings(3))
    if fixed:
        make_whole(module)
    engine.destroy()
    if fixed:
        module(torch.ones(2, 4), "a").backward()  # a plain module again
    return [parameter.numel() for parameter in module.parameters()]


def universal(folder: Path, rank: int) -> dict[str, Any]:
    """Decay and steps of two groups before saving, and after a universal load."""

    def build(load: bool) -> Any:
        torch.manual_seed(0)
        module = Two()
        groups = [
            {"params": [module.a.weight], "weight_decay": 0.5},
            {"params": [module.b.weight], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings(3, universal=load))[0]

    def facts(engine: Any) -> dict[str, Any]:
        optimizer = engine.optimizer
        base, steps = optimizer.optimizer, {}
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            steps[optimizer.sub_group_to_group_id[index]] = float(base.state[flat]["step"])
        decay = [group["weight_decay"] for group in base.param_groups]
        return {"decay": decay, "steps": [steps[index] for index in range(len(decay))]}

    engine = build(load=False)
    hook = engine.optimizer.optimizer.register_step_pre_hook(lambda optimizer, *_: drop(optimizer))
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 4), "a") + engine(torch.ones(2, 4), "b"))
        engine.step()
    hook.remove()
    engine.save_checkpoint(folder / "saved")
    found = {"saved": facts(engine)}
    engine.destroy()
    if rank == 0:
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        convert += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        tag = (folder / "saved" / "latest").read_text()
        paths = ["--input_folder", folder / "saved" / tag, "--output_folder", folder / "saved" / "universal"]
        subprocess.run([*convert, *paths], check=True, capture_output=True)
    dist.barrier()
    engine = build(load=True)
    engine.load_checkpoint(folder / "saved", tag="universal", load_module_only=False)
    found["loaded"] = facts(engine)
    engine.destroy()
    return found


def drop(optimizer: torch.optim.Optimizer) -> None:
    """Group 1 is left out of the second step, so that its count differs."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["weight_decay"] == 0.0 and optimizer.state[parameter]:
                parameter.grad = None


def main() -> None:
    skip_operator_probes()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found: dict[str, Any] = {}
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)):
        for fixed in (False, True):
            name = f"stale {stage}{' offload' if offload else ''}{' fixed' if fixed else ''}"
            found[name] = stale(stage, offload=offload, fixed=fixed)
    found["partitioned"], found["partitioned fixed"] = partitioned(fixed=False), partitioned(fixed=True)
    found["universal"] = universal(folder, dist.get_rank())
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
