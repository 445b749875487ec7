"""What a launch file and a DeepSpeed file may ask for, and DeepSpeed's configuration that comes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lgp_dist.config.run_config import EngineConfig, TrainConfig
from lgp_dist.engine.deepspeed_config import deepspeed_config
from lgp_dist.engine.launch.environment import Launch, check_launch, check_ranks, check_variables, launcher
from lgp_dist.engine.launch.machine import threads_asked, usable_cpus
from lgp_dist.engine.launch.validate import checked_config
from lgp_dist.errors import UserError

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}


def launch(world: int = 1, **environment: str) -> Launch:
    """What a launcher's environment says; field names without accelerate's prefix for short."""
    names = {name if name.isupper() else f"ACCELERATE_{name.upper()}": value for name, value in environment.items()}
    return Launch.from_environment({"WORLD_SIZE": str(world), **names})


def test_launch_without_a_launcher() -> None:
    """An empty environment is one process on the CPU or the one GPU, without DeepSpeed."""
    found = Launch.from_environment({})
    assert (found.world, found.local_world, found.deepspeed, found.precision) == (1, 1, False, "no")
    assert (found.gpu_ids, found.unsupported) == (None, ())
    assert check_launch(found, EngineConfig(), 0) == "cpu"
    assert check_launch(found, EngineConfig(), 1) == "cuda"


def test_launch_reads_the_environment() -> None:
    """World, local world, DeepSpeed and its stage, precision and visible GPUs."""
    found = launch(
        8, **DEEPSPEED, LOCAL_WORLD_SIZE="4", ACCELERATE_MIXED_PRECISION="bf16", CUDA_VISIBLE_DEVICES="0,1,2,3"
    )
    assert found == Launch(8, 4, True, 1, "bf16", "0,1,2,3", ())
    assert launch(8).local_world == 8
    assert launch(8, use_deepspeed="true", deepspeed_zero_stage="3").zero_stage == 3
    assert launch(8, deepspeed_zero_stage="3").zero_stage == 0, "without DeepSpeed there is no stage"


NEUTRAL = {
    "gradient_accumulation_steps": "1",
    "gradient_clipping": "none",
    "deepspeed_offload_optimizer_device": "none",
    "deepspeed_offload_param_device": "none",
    "deepspeed_config_file": "none",
    "use_fsdp": "false",
}


@pytest.mark.parametrize(
    ("world", "gpus", "environment", "engine"),
    [
        (2, 0, {**DEEPSPEED, "CUDA_VISIBLE_DEVICES": ""}, EngineConfig(device="cpu")),
        (2, 0, {**DEEPSPEED, "deepspeed_zero_stage": "0", "CUDA_VISIBLE_DEVICES": ""}, EngineConfig()),
        (4, 0, {**DEEPSPEED, "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}, EngineConfig()),
        (4, 0, {"LOCAL_WORLD_SIZE": "2"}, EngineConfig(device="cpu")),
        (2, 0, {}, EngineConfig()),
        (2, 2, {**DEEPSPEED, "CUDA_VISIBLE_DEVICES": "0,1"}, EngineConfig(device="cuda")),
        (16, 8, {**DEEPSPEED, "LOCAL_WORLD_SIZE": "8"}, EngineConfig()),
        (2, 0, {**DEEPSPEED, "deepspeed_zero_stage": "2", "use_cpu": "true"}, EngineConfig(offload_optimizer=True)),
        (2, 2, {**DEEPSPEED, "deepspeed_zero_stage": "3"}, EngineConfig(precision="fp16")),
        (4, 4, {}, EngineConfig()),
        (1, 0, {"ACCELERATE_MIXED_PRECISION": "bf16"}, EngineConfig(precision="bf16")),
        (1, 0, {"ACCELERATE_MIXED_PRECISION": "no"}, EngineConfig(precision="bf16")),
        (1, 0, {"CUDA_VISIBLE_DEVICES": "-1"}, EngineConfig()),
        (1, 0, NEUTRAL, EngineConfig()),
        (1, 0, {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}, EngineConfig()),
    ],
)
def test_launch_that_fits(world: int, gpus: int, environment: dict[str, str], engine: EngineConfig) -> None:
    """Requests that recipe and machine meet: the device is the GPU where there is one."""
    assert check_launch(launch(world, **environment), engine, gpus) == ("cuda" if gpus else "cpu")


REFUSALS: dict[str, tuple[int, int, dict[str, str], EngineConfig, tuple[str, ...]]] = {
    "stage 4": (
        2,
        0,
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"},
        EngineConfig(),
        ("zero_stage 4", "0, 1, 2"),
    ),
    "offload at stage 0": (
        2,
        0,
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
        EngineConfig(offload_optimizer=True),
        ("engine.offload_optimizer", "stage 0", "take stage 1, 2 or 3"),
    ),
    "union at stage 3": (
        2,
        0,
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        EngineConfig(reduction="union"),
        ("engine.reduction is union", "--engine.reduction all"),
    ),
    "union with offload": (
        2,
        0,
        DEEPSPEED,
        EngineConfig(reduction="union", offload_optimizer=True),
        ("engine.reduction is union", "offload_optimizer"),
    ),
    "offload without deepspeed": (
        2,
        2,
        {},
        EngineConfig(offload_optimizer=True),
        ("offload_optimizer", "no DeepSpeed"),
    ),
    "union without deepspeed": (1, 0, {}, EngineConfig(reduction="union"), ("reduction is union", "DEEPSPEED")),
    "fp16": (
        1,
        1,
        {"mixed_precision": "fp16"},
        EngineConfig(precision="bf16"),
        ("mixed_precision fp16", "engine.precision bf16"),
    ),
    "fp8": (1, 1, {"mixed_precision": "fp8"}, EngineConfig(precision="fp32"), ("mixed_precision fp8", "fp32")),
    "precision": (
        1,
        0,
        {"mixed_precision": "bf16"},
        EngineConfig(precision="fp32"),
        ("mixed_precision bf16", "engine.precision fp32", "--engine.precision"),
    ),
    "gpu ids": (1, 0, {"CUDA_VISIBLE_DEVICES": "0,1"}, EngineConfig(), ("GPUs 0,1", "none that torch can use")),
    "gpu device": (1, 0, {}, EngineConfig(device="cuda"), ("engine.device cuda", "--engine.device cpu")),
    "cpu device": (1, 1, DEEPSPEED, EngineConfig(device="cpu"), ("engine.device cpu", "a GPU is visible")),
    "too many": (4, 2, DEEPSPEED, EngineConfig(), ("4 processes", "2 GPU(s)", "one process per GPU")),
    "too many here": (
        16,
        4,
        {**DEEPSPEED, "LOCAL_WORLD_SIZE": "8"},
        EngineConfig(),
        ("8 processes", "4 GPU(s)", "launch_configs/cpu_multinode.yaml"),
    ),
    "all of none": (
        2,
        0,
        DEEPSPEED,
        EngineConfig(),
        ("takes all GPUs", "has none", "cpu_2.yaml for several processes"),
    ),
    "all of none on nodes": (
        4,
        0,
        {"LOCAL_WORLD_SIZE": "2"},
        EngineConfig(),
        ("takes all GPUs", "has none", "cpu_multinode.yaml for several nodes"),
    ),
    "gpus of nodes": (
        4,
        0,
        {**DEEPSPEED, "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"},
        EngineConfig(),
        ("GPUs 0,1", "cpu_multinode.yaml"),
    ),
    "offload": (
        1,
        0,
        {"deepspeed_offload_optimizer_device": "cpu", "deepspeed_offload_param_device": "nvme"},
        EngineConfig(),
        ("offload_optimizer_device=cpu", "offload_param_device=nvme"),
    ),
    "accumulation": (
        1,
        0,
        {"gradient_accumulation_steps": "4"},
        EngineConfig(),
        ("gradient_accumulation_steps=4", "the recipe's fields"),
    ),
    "clipping": (1, 0, {"gradient_clipping": "1.0"}, EngineConfig(), ("gradient_clipping=1.0", "recipe owns")),
    "fsdp": (1, 0, {"use_fsdp": "true"}, EngineConfig(), ("use_fsdp=true",)),
    "no such variable": (1, 0, {"mixed_precison": "bf16"}, EngineConfig(), ("ACCELERATE_MIXED_PRECISON",)),
    "device": (1, 0, {"torch_device": "cuda"}, EngineConfig(), ("torch_device=cuda",)),
    "dynamo": (1, 0, {"dynamo_backend": "INDUCTOR"}, EngineConfig(), ("dynamo_backend=INDUCTOR",)),
    "zero3 init": (2, 0, {**DEEPSPEED, "deepspeed_zero3_init": "true"}, EngineConfig(), ("zero3_init=true",)),
    "16 bit": (2, 0, {**DEEPSPEED, "deepspeed_zero3_save_16bit_model": "true"}, EngineConfig(), ("save_16bit_model",)),
    "moe": (2, 0, {**DEEPSPEED, "deepspeed_moe_layer_cls_names": "Block"}, EngineConfig(), ("moe_layer_cls_names",)),
    "fields": (
        2,
        0,
        {**DEEPSPEED, "config_ds_fields": "zero_stage,offload_param_nvme_path,zero_stag"},
        EngineConfig(),
        ("deepspeed_config.offload_param_nvme_path, deepspeed_config.zero_stag",),
    ),
    "no deepspeed": (1, 0, {"deepspeed_zero_stage": "3"}, EngineConfig(), ("ACCELERATE_DEEPSPEED_ZERO_STAGE",)),
    "no files": (1, 0, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, EngineConfig(), ("CUDA_VISIBLE_DEVICES", "NoDevFiles")),
    "cpu or gpu": (1, 1, {"use_cpu": "True"}, EngineConfig(device="cuda"), ("asks for the CPU", ": remove one")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_launch_that_does_not_fit_is_a_sentence(name: str) -> None:
    """Each refusal names the setting and its value, and says what to do, in one sentence."""
    world, gpus, environment, engine, words = REFUSALS[name]
    with pytest.raises(UserError) as caught:
        check_launch(launch(world, **environment), engine, gpus)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.endswith(".") and "\n" not in text and ": " in text


WRONG_VALUES = {
    "flag": ({"use_deepspeed": "1"}, "ACCELERATE_USE_DEEPSPEED is '1', but takes true or false"),
    "cpu": ({"use_cpu": "yes"}, "ACCELERATE_USE_CPU is 'yes'"),
    "stage": ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "two"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE is 'two'"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_variables_that_hold_something_else(name: str) -> None:
    environment, words = WRONG_VALUES[name]
    with pytest.raises(UserError, match=words):
        launch(1, **environment)


def test_empty_variables_are_missing() -> None:
    empty = {"WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "", "ACCELERATE_USE_DEEPSPEED": "", "ACCELERATE_MIXED_PRECISION": ""}
    assert Launch.from_environment(empty) == Launch.from_environment({})
    left = {**empty, "RANK": " ", "PMI_SIZE": "", "CUDA_VISIBLE_DEVICES": "", "HOME": ""}
    check_variables(left)
    assert left == {"CUDA_VISIBLE_DEVICES": "", "HOME": ""}


RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ""),
        (RANK, ""),
        ({**RANK, "OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2"}, ""),  # a launcher in each task of srun or mpirun
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "4"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**RANK, "RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS is 2, .* by srun alone"),
        ({**RANK, "SLURM_STEP_NUM_TASKS": "2"}, ""),  # train.sbatch on two nodes
    ],
)
def test_ranks_that_a_launcher_has_started(environment: dict[str, str], words: str) -> None:
    if not words:
        check_ranks(environment)
        return
    with pytest.raises(UserError, match=words):
        check_ranks(environment)


def test_deepspeeds_launcher_is_understood() -> None:
    """Its number of a node's ranks, and what it is for, unless other variables say otherwise."""
    left = {**RANK, "CROSS_SIZE": "2", "LOCAL_SIZE": "1"}
    check_variables(left)
    check_ranks(left)
    found = Launch.from_environment(left)
    assert (found.world, found.local_world, found.engine_name, launcher(left)) == (2, 1, "zero1", "deepspeed")
    left["ACCELERATE_USE_DEEPSPEED"] = "false"
    check_variables(left)
    assert Launch.from_environment(left).engine_name == "ddp"


LAUNCHERS = {
    "no launcher": {},
    "RANK and WORLD_SIZE": RANK,
    "torchrun": {**RANK, "TORCHELASTIC_RUN_ID": "none", "ACCELERATE_USE_DEEPSPEED": "true"},
    "accelerate launch": {"ACCELERATE_MIXED_PRECISION": "no"},
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_have_names(name: str) -> None:
    assert launcher(LAUNCHERS[name]) == name


@pytest.mark.parametrize("launched", [["accelerate.commands.launch"], ["torch.distributed.run", "--nproc-per-node=2"]])
@pytest.mark.parametrize("given", ["", "1", "3"])
def test_threads_that_are_asked_for(tmp_path: Path, launched: list[str], given: str) -> None:
    """OMP_NUM_THREADS counts, under launchers too, which set it to 1 where it is unset."""
    script = tmp_path / "show.py"
    script.write_text(
        "import os\nfrom pathlib import Path\nfrom lgp_dist.engine.launch.machine import threads_asked\n"
        "Path(f\"asked-{os.environ.get('RANK', '0')}\").write_text(str(threads_asked(os.environ)))\n"
        "Path('environment').write_text(os.environ['OMP_NUM_THREADS'])\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("OMP_NUM_THREADS", None)
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    command = [sys.executable, "-m", *launched, str(script)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "environment").read_text() == (given or "1")
    assert {path.read_text() for path in tmp_path.glob("asked-*")} == {given or "0"}


def test_threads_that_are_asked_for_without_a_launcher() -> None:
    assert [threads_asked({"OMP_NUM_THREADS": text}) for text in ("1", "4,2", "many", "")] == [1, 4, 0, 0]


def test_cpus_of_affinity() -> None:
    """As many as the kernel lets the process run on."""
    code = "from lgp_dist.engine.launch.machine import usable_cpus; print(usable_cpus())"
    environment, cpus = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, os.sched_getaffinity(0)
    for allowed in ({min(cpus)}, cpus):
        done = subprocess.run(
            [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {allowed}); {code}"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert 1 <= int(done.stdout) <= len(allowed)


QUOTAS = {
    "version 2": ("0::/job/step\n", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 2),
    "version 2 in a container": ("0::/\n", {"cpu.max": "50000 100000"}, 1),
    "version 1": (
        "3:cpu,cpuacct:/job\n1:cpuset:/\n",
        {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"},
        3,
    ),
    "version 1 in a container": (
        "3:cpuacct,cpu:/docker/1f\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
        1,
    ),
    "no limit": (
        "3:cpu:/\n0::/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "cpu.max": "max 100000"},
        64,
    ),
    "no cgroups": ("0::/\n", {}, 64),
}
"""/proc/self/cgroup and the files of cgroups, as the kernel's documentation has them, and CPUs of 64."""


@pytest.mark.parametrize("name", QUOTAS)
def test_cpus_of_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    membership, files, usable = QUOTAS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cgroup").write_text(membership)
    for path, text in files.items():
        (tmp_path / "sys" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / path).write_text(f"{text}\n")
    assert usable_cpus(tmp_path / "cgroup", tmp_path / "sys") == usable


@pytest.mark.parametrize("gpus", ["NoDevFiles", "0", "0,1"])
def test_the_cpu_is_obeyed_whatever_gpus_are_asked_for(gpus: str) -> None:
    assert check_launch(launch(1, CUDA_VISIBLE_DEVICES=gpus), EngineConfig(device="cpu"), 0) == "cpu"
    assert check_launch(launch(1, use_cpu="true", CUDA_VISIBLE_DEVICES=gpus), EngineConfig(), 1) == "cpu"


def test_without_deepspeed_the_recipe_may_ask_for_the_cpu() -> None:
    """DeepSpeed takes the GPU where there is one; DDP and a single process do as they are told."""
    assert check_launch(launch(2), EngineConfig(device="cpu"), 4) == "cpu"
    assert check_launch(launch(1), EngineConfig(device="cpu"), 1) == "cpu"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("per_rank", "accumulate", "world"), [(32, 2, 2), (1, 1, 1), (8, 4, 64)])
def test_deepspeed_config(stage: int, precision: Any, per_rank: int, accumulate: int, world: int) -> None:
    """DeepSpeed's batch identity holds, clipping is named, communication stays fp32 and in one order."""
    train = TrainConfig(accumulate=accumulate, clip_grad=0.0)
    found = deepspeed_config(stage, world, EngineConfig(precision=precision), train, per_rank, {})
    assert found["train_micro_batch_size_per_gpu"] == per_rank
    assert found["gradient_accumulation_steps"] == accumulate
    assert found["train_batch_size"] == per_rank * accumulate * world
    assert found["gradient_clipping"] == 0.0
    assert found["zero_optimization"]["stage"] == stage
    assert found["zero_optimization"]["overlap_comm"] is False
    assert not {"fp16", "bf16", "torch_autocast", "communication_data_type"} & set(found)
    assert found == json.loads(json.dumps(found))


@pytest.mark.parametrize("clip", [0.0, 1.0, 5.0])
def test_deepspeed_clips_as_the_recipe_says(clip: float) -> None:
    """The recipe's largest norm is always written down, also when it is 0 for none."""
    found = deepspeed_config(1, 2, EngineConfig(), TrainConfig(clip_grad=clip), 8, {})
    assert found["gradient_clipping"] == clip


def deepspeed_file(folder: Path, settings: Any) -> dict[str, str]:
    """An environment that names a DeepSpeed file of these settings."""
    path = folder / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "deepspeed_config_file": str(path)}


def test_a_deepspeed_file_adds_what_does_not_change_the_result(tmp_path: Path) -> None:
    """Its stage holds, its buckets go through, `auto` and switched-off settings say nothing, ours win the rest."""
    settings = {
        "train_batch_size": "auto",
        "bf16": {},
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1000,
            "overlap_comm": True,
            "round_robin_gradients": False,
            "offload_optimizer": "auto",
        },
    }
    found = launch(2, **deepspeed_file(tmp_path, settings))
    assert found.zero_stage == 2
    assert check_launch(found, EngineConfig(device="cpu"), 0) == "cpu"
    config = deepspeed_config(2, 2, EngineConfig(), TrainConfig(), 8, found.file)
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": 1000,
    }
    assert config["wall_clock_breakdown"] is True and config["train_batch_size"] == 16


FILE_REFUSALS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "round robin": ({"zero_optimization": {"round_robin_gradients": True}}, ("round_robin_gradients", "leave it out")),
    "reentrant": (
        {"activation_checkpointing": {"partition_activations": True}},
        ("activation_checkpointing", "reentrant", "--engine.activation-checkpointing on"),
    ),
    "bf16 sums": ({"communication_data_type": "bfp16"}, ("communication_data_type", '"bfp16"', "fp32")),
    "quantized": ({"zero_optimization": {"zero_quantized_gradients": True}}, ("zero_quantized_gradients", "rounded")),
    "hpz": (
        {"zero_optimization": {"zero_hpz_partition_size": 2}},
        ("zero_hpz_partition_size", "not known"),
    ),
    "clipping": ({"gradient_clipping": 1.0}, ("gradient_clipping", "train.clip_grad")),
    "precision": ({"bf16": {"enabled": True}}, ("bf16", "engine.precision")),
    "optimizer": ({"optimizer": {"type": "Adam"}}, ("optimizer", "train.optimizer")),
    "misspelt": ({"zero_optimisation": {"stage": 2}}, ("zero_optimisation", "the nearest is zero_optimization")),
    "unknown": ({"zenflow": {"topk_ratio": 0.1}}, ("zenflow", "not known to be exact")),
    "no object": ([1], ("holds no object",)),
    "no section": ({"zero_optimization": 2}, ("zero_optimization 2",)),
    "no json": ("{", ("cannot be read",)),
    "twice": ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 3}}', ("zero_optimization twice",)),
    "twice inside": ('{"zero_optimization": {"stage": 1, "stage": 3}}', ("stage twice",)),
    "infinity": ('{"steps_per_print": Infinity}', ("Infinity",)),
    **{
        f"stage {stage}": ({"zero_optimization": {"stage": stage}}, ("zero_optimization.stage to", "0, 1, 2 or 3"))
        for stage in ("2", [2], 2.0, 4, True, False, "three", None, {})
    },
    "two stages": ({"zero_optimization": {"stage": 3}}, ("stage 3", "zero_stage 2", "leave one out")),
}


@pytest.mark.parametrize("name", FILE_REFUSALS)
def test_a_deepspeed_file_that_is_refused(tmp_path: Path, name: str) -> None:
    """One sentence names file and setting and says what to choose instead."""
    settings, words = FILE_REFUSALS[name]
    stage = {"deepspeed_zero_stage": "2"} if name == "two stages" else {}
    with pytest.raises(UserError) as caught:
        launch(2, **deepspeed_file(tmp_path, settings), **stage)
    text = str(caught.value)
    assert all(word in text for word in ("ds.json", *words)), text
    assert text.endswith(".") and "\n" not in text


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        (2, "offload_param", {"device": "cpu"}),
        (1, "sub_group_size", 1000),
        (2, "stage3_prefetch_bucket_size", 1000),
        (3, "allgather_bucket_size", 1000),
        (0, "reduce_bucket_size", 1000),
    ],
)
def test_settings_of_another_stage_are_refused(tmp_path: Path, stage: int, name: str, value: Any) -> None:
    """DeepSpeed takes them without effect."""
    found = launch(2, **deepspeed_file(tmp_path, {"zero_optimization": {"stage": stage, name: value}}))
    with pytest.raises(UserError, match=f"zero_optimization.{name}, which has no effect at zero_stage {stage}"):
        check_launch(found, EngineConfig(), 0)


def test_sections_that_are_off_say_nothing(tmp_path: Path) -> None:
    off = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False, "loss_scale": 0}}
    zero = {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}}
    found = launch(2, **deepspeed_file(tmp_path, {**off, "zero_optimization": zero}))
    assert found.file == {"zero_optimization": {"stage": 3}}


def test_what_deepspeed_refuses_is_a_sentence_for_a_run_too() -> None:
    file = {"zero_optimization": {"stage": 1, "allgather_bucket_size": "5e8"}}
    with pytest.raises(UserError, match='DeepSpeed refuses .*"5e8".*valid integer'):
        checked_config(1, EngineConfig(), TrainConfig(), 1, file)


def test_a_deepspeed_file_that_is_missing(tmp_path: Path) -> None:
    missing = {"ACCELERATE_USE_DEEPSPEED": "true", "deepspeed_config_file": str(tmp_path / "none.json")}
    with pytest.raises(UserError, match="none.json cannot be read"):
        launch(2, **missing)


def test_overlap_at_stage_1_is_refused(tmp_path: Path) -> None:
    """There DeepSpeed would reduce gradients in the order in which they come."""
    file = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 1, "overlap_comm": True}})
    with pytest.raises(UserError, match="overlap_comm with zero_stage 1"):
        check_launch(launch(2, **file), EngineConfig(), 0)
