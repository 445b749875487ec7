"""What the launcher asked for, read from its environment and checked against recipe and machine. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lgp_dist.config import EngineConfig, TrainConfig
from lgp_dist.errors import UserError

ZERO_STAGES = (0, 1)
"""Stages that train different paths per rank exactly."""


@dataclass(frozen=True)
class Launch:
    """The launcher's request."""

    world: int
    """Processes over all nodes."""
    local_world: int
    """Processes on this node."""
    deepspeed: bool
    """Whether DeepSpeed was asked for."""
    zero_stage: int
    """DeepSpeed's ZeRO stage."""
    precision: str
    """accelerate's mixed_precision: no, bf16, fp16 or fp8."""
    gpu_ids: str | None
    """Visible GPUs as the launch file names them; None where it does not."""
    unsupported: tuple[str, ...] = ()
    """Settings that belong to the recipe or are not supported, as `name=value`."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Launch":
        """Reads what `accelerate launch` sets; without it, one process and no DeepSpeed."""
        world = int(environment.get("WORLD_SIZE", "1"))

        def flag(name: str) -> bool:
            return environment.get(name, "false").lower() == "true"

        return cls(
            world=world,
            local_world=int(environment.get("LOCAL_WORLD_SIZE", str(world))),
            deepspeed=flag("ACCELERATE_USE_DEEPSPEED"),
            zero_stage=int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")),
            precision=environment.get("ACCELERATE_MIXED_PRECISION", "no"),
            gpu_ids=environment.get("CUDA_VISIBLE_DEVICES"),
            unsupported=tuple(_unsupported(environment)),
        )


def _unsupported(environment: Mapping[str, str]) -> list[str]:
    """Settings of an accelerate file that this project decides itself, where they are not at their neutral value."""
    neutral = {
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": {"none"},
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": {"none"},
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": {"none"},
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": {"1", "auto"},
        "ACCELERATE_GRADIENT_CLIPPING": {"none", "auto"},
        "ACCELERATE_USE_FSDP": {"false"},
        "ACCELERATE_USE_MEGATRON_LM": {"false"},
    }
    names = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file"}
    return [
        f"{names.get(name, name.removeprefix('ACCELERATE_').removeprefix('DEEPSPEED_').lower())}={environment[name]}"
        for name, values in neutral.items()
        if environment.get(name, next(iter(values))).lower() not in values
    ]


def check_launch(launch: Launch, engine: EngineConfig, cuda_devices: int) -> str:
    """The device type to use, `cpu` or `cuda`; UserError where launch, recipe and machine do not fit together.

    cuda_devices: GPUs that torch sees.
    """
    if launch.unsupported:
        raise UserError(
            f"The launch file sets {', '.join(launch.unsupported)}, but the recipe owns batch, accumulation, clipping "
            "and DeepSpeed's settings: remove it there and use the recipe's fields."
        )
    if launch.deepspeed and launch.zero_stage not in ZERO_STAGES:
        raise UserError(
            f"The launch file sets zero_stage {launch.zero_stage}, which is not supported yet, because with a "
            "different path on each rank stages 2 and 3 train wrongly without an error: set zero_stage to 1."
        )
    if launch.world > 1 and not launch.deepspeed:
        raise UserError(
            f"{launch.world} processes were launched without DeepSpeed, which is not supported yet: take a file of "
            "launch_configs/ (distributed_type: DEEPSPEED)."
        )
    if launch.precision not in ("no", engine.precision):
        raise UserError(
            f"The launch file sets mixed_precision {launch.precision}, but the recipe has engine.precision "
            f"{engine.precision}: remove it from the launch file, or choose --engine.precision."
        )
    return _device(launch, engine, cuda_devices)


def _device(launch: Launch, engine: EngineConfig, cuda_devices: int) -> str:
    wants_gpu = bool(launch.gpu_ids and launch.gpu_ids.strip() not in ("", "-1"))
    if not cuda_devices and (wants_gpu or engine.device == "cuda"):
        asked = f"The launch file asks for GPUs {launch.gpu_ids}" if wants_gpu else "The recipe has engine.device cuda"
        raise UserError(
            f"{asked}, but this machine has none that torch can use: take launch_configs/cpu_2.yaml and "
            "--engine.device cpu, or a machine with a GPU."
        )
    if not cuda_devices:
        return "cpu"
    if engine.device == "cpu":
        raise UserError(
            "The recipe has engine.device cpu, but a GPU is visible and accelerate would use it: take a launch file "
            'with gpu_ids "" (launch_configs/cpu_2.yaml), or set CUDA_VISIBLE_DEVICES to nothing.'
        )
    if launch.local_world > cuda_devices:
        raise UserError(
            f"{launch.local_world} processes were launched on a machine with {cuda_devices} GPU(s): launch one process "
            "per GPU, or take launch_configs/cpu_2.yaml."
        )
    return "cuda"


def deepspeed_config(launch: Launch, engine: EngineConfig, train: TrainConfig, per_rank: int) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it set here.

    per_rank: images per rank and micro-step. bf16 is DeepSpeed's `torch_autocast` with an empty list of modules whose
    gradients may travel in bf16: parameters, gradients and sums stay fp32, which is exact at every stage.
    `overlap_comm` is off because it would reduce buckets in the order in which gradients arrive, and that differs with
    the path. Clipping is named even when off, since accelerate turns a missing value into 1.0.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": per_rank,
        "gradient_accumulation_steps": train.accumulate,
        "train_batch_size": per_rank * train.accumulate * launch.world,
        "gradient_clipping": train.clip_grad,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": launch.zero_stage, "overlap_comm": False, "round_robin_gradients": False},
    }
    if engine.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
