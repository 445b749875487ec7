"""Reads the launcher's request from the environment and checks it against recipe and machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lgp_dist.config.run_config import EngineConfig
from lgp_dist.engine.deepspeed_config import check_zero_stage, read_deepspeed_file
from lgp_dist.errors import UserError


@dataclass(frozen=True)
class Launch:
    """The launcher's request."""

    world: int
    """Processes on all nodes."""
    local_world: int
    """Processes on this node."""
    deepspeed: bool
    """Whether DeepSpeed was requested; otherwise several processes use torch's DistributedDataParallel."""
    zero_stage: int
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    precision: str
    """accelerate's mixed_precision: no, bf16, fp16 or fp8."""
    gpu_ids: str | None
    """Visible GPUs as the launch file names them; None if it does not."""
    unsupported: tuple[str, ...] = ()
    """Settings that the recipe owns or that are not supported, as `name=value`."""
    file: Mapping[str, Any] = field(default_factory=dict)
    """Checked settings of the DeepSpeed file that the launch file names."""

    @property
    def engine_name(self) -> str:
        """zero0 .. zero3, ddp for several processes without DeepSpeed, one for a single process without it."""
        if self.deepspeed:
            return f"zero{self.zero_stage}"
        return "ddp" if self.world > 1 else "one"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Launch":
        """Reads what `accelerate launch` sets; without a launcher, one process and no DeepSpeed.

        Raises UserError if it names a DeepSpeed file that cannot be read or has settings that are not exact.
        """
        world = int(environment.get("WORLD_SIZE", "1"))

        def flag(name: str) -> bool:
            return environment.get(name, "false").lower() == "true"

        deepspeed = flag("ACCELERATE_USE_DEEPSPEED")
        named = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        file = read_deepspeed_file(named) if deepspeed and named.lower() != "none" else {}
        stage = file.get("zero_optimization", {}).get("stage", environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1"))
        return cls(
            world=world,
            local_world=int(environment.get("LOCAL_WORLD_SIZE", str(world))),
            deepspeed=deepspeed,
            zero_stage=int(stage) if deepspeed else 0,
            precision=environment.get("ACCELERATE_MIXED_PRECISION", "no"),
            gpu_ids=environment.get("CUDA_VISIBLE_DEVICES"),
            unsupported=tuple(_unsupported(environment)),
            file=file,
        )


def _unsupported(environment: Mapping[str, str]) -> list[str]:
    """Settings of an accelerate file that this project decides itself, unless they have their neutral value."""
    neutral = {
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": {"none"},
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": {"none"},
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": {"1", "auto"},
        "ACCELERATE_GRADIENT_CLIPPING": {"none", "auto"},
        "ACCELERATE_USE_FSDP": {"false"},
        "ACCELERATE_USE_MEGATRON_LM": {"false"},
    }
    return [
        f"{name.removeprefix('ACCELERATE_').removeprefix('DEEPSPEED_').lower()}={environment[name]}"
        for name, values in neutral.items()
        if environment.get(name, next(iter(values))).lower() not in values
    ]


def check_launch(launch: Launch, engine: EngineConfig, cuda_devices: int) -> str:
    """Returns the device type, `cpu` or `cuda`. Raises UserError if launch, recipe and machine do not fit together.

    cuda_devices: GPUs that torch sees.
    """
    if launch.unsupported:
        raise UserError(
            f"The launch file sets {', '.join(launch.unsupported)}, but the recipe owns batch, accumulation, clipping "
            "and DeepSpeed's settings: remove it there and use the recipe's fields."
        )
    if launch.deepspeed:
        check_zero_stage(launch.zero_stage, engine, launch.file)
    elif engine.offload_optimizer or engine.reduction == "union":
        asked = "offload_optimizer is on" if engine.offload_optimizer else "reduction is union"
        raise UserError(
            f"engine.{asked}, but the launch has no DeepSpeed: take a launch file with distributed_type DEEPSPEED, or "
            "leave the setting out."
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
    if not cuda_devices or engine.device == "cpu" and not launch.deepspeed:
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
