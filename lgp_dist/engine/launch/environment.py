"""Reads the launcher's request from the environment and checks it against recipe and machine. Needs no torch."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from lgp_dist.config.run_config import EngineConfig
from lgp_dist.engine.deepspeed_config import check_zero_stage, read_deepspeed_file
from lgp_dist.errors import UserError

COUNTS = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
"""Variables that a launcher sets for each rank -> the smallest value."""

MPI = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}
"""Numbers of processes that mpirun and srun set."""

DEEPSPEED_SIZES = {"CROSS_SIZE", "LOCAL_SIZE"}
"""Numbers of nodes and of a node's ranks, which DeepSpeed's own launcher sets."""

READ = {
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"),
    "ACCELERATE_CONFIG_DS_FIELDS",
}
"""Variables that a run obeys, itself or through accelerate. It refuses others that begin with ACCELERATE_."""

NEUTRAL = {"none", "no", "false", "auto", "default"}
"""Values of those others that mean the same as leaving them out, next to one gradient accumulation step."""

FIELDS = {
    *("zero_stage", "deepspeed_config_file", "deepspeed_multinode_launcher", "zero3_init_flag"),
    *("zero3_save_16bit_model", "deepspeed_moe_layer_cls_names", "offload_optimizer_device", "offload_param_device"),
    *("gradient_accumulation_steps", "gradient_clipping"),
}
"""Keys of a launch file's section deepspeed_config that accelerate hands on or that a launch needs. The others have no
effect in a launch of this project; accelerate lists the names of all in ACCELERATE_CONFIG_DS_FIELDS."""


def check_variables(environment: MutableMapping[str, str]) -> None:
    """Removes launchers' variables that are empty. UserError for a value that is not a number where one is needed.

    What DeepSpeed's launcher says gets the names that other launchers use.
    """
    for name in [*environment]:
        if (name in COUNTS or name in MPI or name.startswith("ACCELERATE_")) and not environment[name].strip():
            del environment[name]
    if by_deepspeed(environment):
        environment.setdefault("LOCAL_WORLD_SIZE", environment["LOCAL_SIZE"])
        environment.setdefault("ACCELERATE_USE_DEEPSPEED", "true")
    for name, least in COUNTS.items():
        value = environment.get(name, str(least))
        if not (value.isascii() and value.isdigit() and int(value) >= least):
            raise UserError(f"{name} is {value!r}, but must be a whole number from {least}: unset it.")


def by_deepspeed(environment: Mapping[str, str]) -> bool:
    """Whether DeepSpeed's own launcher has started this rank."""
    return environment.keys() >= {*DEEPSPEED_SIZES, "RANK"}


def launcher(environment: Mapping[str, str]) -> str:
    """What has started this rank, in words; for after `check_variables`."""
    elastic = "TORCHELASTIC_RUN_ID" in environment
    if by_deepspeed(environment):
        return "deepspeed"
    if "ACCELERATE_MIXED_PRECISION" in environment:
        return "accelerate launch"
    return "torchrun" if elastic else "RANK and WORLD_SIZE" if "RANK" in environment else "no launcher"


def check_ranks(environment: Mapping[str, str]) -> None:
    """UserError where ranks were started in a way that leaves them without each other."""
    start = "start ranks with `accelerate launch` or torchrun (docs/launching.md)"
    for name in sorted(MPI & environment.keys()):
        if "RANK" not in environment and environment[name] != "1":
            how = "srun alone" if name.startswith("SLURM") else "MPI"
            raise UserError(
                f"{name} is {environment[name]}, but lgp does not join ranks by {how}: {start}, or unset it."
            )
    world = environment.get("WORLD_SIZE", "1")
    if int(environment.get("RANK", "0")) >= int(world):
        raise UserError(f"RANK is {environment['RANK']}, but WORLD_SIZE is {world}: {start}, or unset it.")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and world != "1":
        raise UserError(f"WORLD_SIZE is {world}, but {', '.join(missing)} are not set: {start}, or unset it.")


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
    """CUDA_VISIBLE_DEVICES, which a launch file's gpu_ids becomes; None if neither is set."""
    unsupported: tuple[str, ...] = ()
    """Settings that the recipe owns or that are not supported, as `name=value`."""
    file: Mapping[str, Any] = field(default_factory=dict)
    """Checked settings of the DeepSpeed file that the launch file names."""
    cpu: bool = False
    """Whether the launch asks for the CPU."""

    def __str__(self) -> str:
        added = [name for name in self.file if name != "zero_optimization"]
        added += [f"zero_optimization.{name}" for name in self.file.get("zero_optimization", {})]
        settings = f", with {', '.join(added)} of the DeepSpeed file" if added else ""
        return f"engine {self.engine_name} on {self.world} process(es){settings}"

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
        environment = {name: value for name, value in environment.items() if value or name == "CUDA_VISIBLE_DEVICES"}
        world = int(environment.get("WORLD_SIZE", "1"))
        deepspeed = _flag(environment, "ACCELERATE_USE_DEEPSPEED")
        named = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        file = read_deepspeed_file(named) if deepspeed and named.lower() != "none" else {}
        return cls(
            world=world,
            local_world=int(environment.get("LOCAL_WORLD_SIZE", str(world))),
            deepspeed=deepspeed,
            zero_stage=_zero_stage(environment, named, file) if deepspeed else 0,
            precision=environment.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
            gpu_ids=environment.get("CUDA_VISIBLE_DEVICES"),
            unsupported=tuple(_unsupported(environment, deepspeed)),
            file=file,
            cpu=_flag(environment, "ACCELERATE_USE_CPU"),
        )


def _flag(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "false")
    if value.lower() not in ("true", "false"):
        raise UserError(f"{name} is {value!r}, but takes true or false: choose one of these.")
    return value.lower() == "true"


def _zero_stage(environment: Mapping[str, str], named: str, file: Mapping[str, Any]) -> int:
    """The stage of DeepSpeed file or launch file; 1 where none is set. UserError if they differ."""
    own, given = file.get("zero_optimization", {}).get("stage"), environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if given is not None and not given.isdigit():
        raise UserError(f"ACCELERATE_DEEPSPEED_ZERO_STAGE is {given!r}, but stages are 0, 1, 2 and 3: choose one.")
    if own is not None and given is not None and own != int(given):
        raise UserError(
            f"{named} sets zero_optimization.stage {own}, but the launch file sets zero_stage {given}: leave one out."
        )
    return own if own is not None else int(given or 1)


def _unsupported(environment: Mapping[str, str], deepspeed: bool) -> list[str]:
    """Settings of an accelerate file, and variables, that a run does not obey, unless they say nothing."""
    found = []
    for name, value in sorted(environment.items()):
        unread = name not in READ or name.startswith("ACCELERATE_DEEPSPEED_") and not deepspeed
        says_nothing = value.lower() in NEUTRAL or (name, value) == ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if name.startswith("ACCELERATE_") and unread and not says_nothing:
            short = name.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
            found.append(f"{short}={value} ({name})")
    named = environment.get("ACCELERATE_CONFIG_DS_FIELDS", "")
    return found + [f"deepspeed_config.{name}" for name in named.split(",") if name and name not in FIELDS]


def check_launch(launch: Launch, engine: EngineConfig, cuda_devices: int) -> str:
    """Returns the device type, `cpu` or `cuda`. Raises UserError if launch, recipe and machine do not fit together.

    cuda_devices: GPUs that torch sees.
    """
    check_requests(launch, engine)
    return _device(launch, engine, cuda_devices)


def check_requests(launch: Launch, engine: EngineConfig) -> None:
    """UserError if launch and recipe do not fit together, on whatever machine."""
    if launch.unsupported:
        raise UserError(
            f"The launch file or the environment sets {', '.join(launch.unsupported)}, which has no effect here, since "
            "the recipe owns batch, accumulation, clipping, offloading and the engine's settings: remove it there and "
            "use the recipe's fields."
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
    if launch.cpu and engine.device == "cuda":
        raise UserError("The launch asks for the CPU, but the recipe has engine.device cuda: remove one of them.")


def _device(launch: Launch, engine: EngineConfig, cuda_devices: int) -> str:
    gpus, wants_cpu = (launch.gpu_ids or "").strip(), engine.device == "cpu" or launch.cpu
    wants_gpu = gpus not in ("", "-1")
    several = launch.world > launch.local_world
    unsaid = launch.gpu_ids is None and launch.world > 1 and (several or launch.deepspeed)
    cpu_file = f"launch_configs/{'cpu_multinode' if several else 'cpu_2'}.yaml"
    if not cuda_devices and not wants_cpu and (wants_gpu or unsaid or engine.device == "cuda"):
        asked = "CUDA_VISIBLE_DEVICES, which a launch file sets by gpu_ids, asks for GPUs " + gpus
        asked = asked if wants_gpu else "The recipe has engine.device cuda"
        asked = asked if wants_gpu or engine.device == "cuda" else "The launch takes all GPUs"
        raise UserError(
            f"{asked}, but this machine has none that torch can use: choose --engine.device cpu (with {cpu_file} for "
            f"several {'nodes' if several else 'processes'}), or a machine with a GPU."
        )
    if not cuda_devices or wants_cpu and not launch.deepspeed:
        return "cpu"
    if wants_cpu:
        raise UserError(
            "The recipe has engine.device cpu, but a GPU is visible and accelerate would use it: take a launch file "
            f'with gpu_ids "" ({cpu_file}), or set CUDA_VISIBLE_DEVICES to nothing.'
        )
    if launch.local_world > cuda_devices:
        raise UserError(
            f"{launch.local_world} processes were launched on a machine with {cuda_devices} GPU(s): launch one process "
            f"per GPU, or take {cpu_file}."
        )
    return "cuda"
