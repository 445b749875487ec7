"""`lgp launch check`: schema against accelerate's own parser, each trap, what nodes run against real launchers."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from run_helpers import LIMIT_S, Lgp

from lgp_dist.engine.launch.check import Demand, check_file
from lgp_dist.engine.launch.file import read_launch_file
from lgp_dist.engine.launch.keys import DEEPSPEED, REFUSED, TOP, check_settings
from lgp_dist.engine.launch.plan import Given, plan

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch_configs").glob("*.yaml"))

CPU = {
    "distributed_type": "DEEPSPEED",
    "num_machines": 1,
    "num_processes": 2,
    "gpu_ids": "",
    "main_process_port": 0,
    "deepspeed_config": {"zero_stage": 1},
}
NODES = {
    **CPU,
    "num_machines": 2,
    "num_processes": 4,
    "main_process_port": 29533,
    "deepspeed_config": {"zero_stage": 1, "deepspeed_multinode_launcher": "standard"},
}


def write(folder: Path, settings: Any) -> Path:
    path = folder / "launch.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return path


def test_schema_knows_what_accelerate_knows() -> None:
    """Keys are those of accelerate's dataclass, with the old ones that it takes; each of its parser's has a rule."""
    assert {*TOP, *REFUSED, "deepspeed_config"} == {field.name for field in fields(ClusterConfig)} | {
        "fp16",
        "dynamo_backend",
    }
    assert "fsdp_config" in REFUSED and not REFUSED & {*TOP, "deepspeed_config"}
    assert all(rule in (str, int, float, bool) or isinstance(rule, tuple) for rule in DEEPSPEED.values())


SCHEMA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nested typo": (
        {"deepspeed_config": {"zero_stage": 1, "deepspeed_multinode_laucher": "standard"}},
        (
            "deepspeed_config.deepspeed_multinode_laucher",
            "without effect",
            "write deepspeed_config.deepspeed_multinode_launcher",
        ),
    ),
    "typo": ({"num_proceses": 2}, ("num_proceses", "write num_processes")),
    "not nested": ({"zero_stage": 2}, ("zero_stage", "write deepspeed_config.zero_stage")),
    "too nested": ({"deepspeed_config": {"gpu_ids": "0"}}, ("deepspeed_config.gpu_ids", "write gpu_ids")),
    "stage": ({"deepspeed_config": {"zero_stage": 4}}, ("zero_stage to 4", "0 or 1 or 2 or 3")),
    "stage text": ({"deepspeed_config": {"zero_stage": "2"}}, ("zero_stage to '2'",)),
    "stage bool": ({"deepspeed_config": {"zero_stage": True}}, ("zero_stage to True",)),
    "launcher": (
        {"deepspeed_config": {"deepspeed_multinode_launcher": "standart"}},
        ("'standart'", '"standard"'),
    ),
    "gpu number": ({"gpu_ids": 0}, ("gpu_ids to 0", "a text in quotes")),
    "bool text": ({"use_cpu": "false"}, ("use_cpu to 'false'", "true or false")),
    "precision": ({"mixed_precision": False}, ("mixed_precision", 'write "no"')),
    "port": ({"main_process_port": 70000}, ("70000", "0 to 65535")),
    "processes": ({"num_processes": 0}, ("num_processes to 0", "1 or more")),
    "null": ({"num_machines": None}, ("num_machines to None", "1 or more")),
    "fsdp": ({"fsdp_config": {"fsdp_version": 2}}, ("fsdp_config", "leave it out")),
    "section": ({"deepspeed_config": 2}, ("deepspeed_config 2",)),
}


@pytest.mark.parametrize("name", SCHEMA)
def test_schema(tmp_path: Path, name: str) -> None:
    """Each mistake is one sentence that names file, key and value; without it there is none."""
    change, words = SCHEMA[name]
    path = write(tmp_path, {**CPU, **change})
    ((sentence,), _) = check_settings(path, read_launch_file(path), {})
    assert all(word in sentence for word in (str(path), *words)), sentence
    assert sentence.endswith(".") and "\n" not in sentence
    good = write(tmp_path, {**CPU, "fsdp_config": {}, "downcast_bf16": "no", "tpu_env": [], "tpu_use_sudo": False})
    assert check_settings(good, read_launch_file(good), {})[0] == []
    for key in ("distributed_type", "num_processes"):
        short = write(tmp_path, {name: value for name, value in CPU.items() if name != key})
        ((sentence,), _) = check_settings(short, read_launch_file(short), {})
        assert f"has no {key}" in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("1: 2\ndistributed_type: NO\n", "the key 1, which is no name"),
        ("num_processes: 2\nnum_processes: 4\n", "sets num_processes twice"),
        ("deepspeed_config:\n  zero_stage: 1\n  zero_stage: 2\n", "sets deepspeed_config.zero_stage twice"),
        ("? [num_processes]\n: 2\n", "is not valid YAML"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, lgp: Lgp, text: str | None, words: str) -> None:
    path = tmp_path / "launch.yaml"
    if text is not None:
        path.write_text(text)
    assert words in lgp("launch", "check", path).sentence


def found(lgp: Lgp, path: Path, *options: str) -> dict[str, Any]:
    """The object of --json; its status agrees with its problems."""
    result = lgp("launch", "check", path, "--json", *options)
    assert "Traceback" not in result.err
    report = json.loads(result.out)
    assert result.status == (2 if report["problems"] else 0), result
    return report


ADDRESS = ("--address", "192.0.2.7")
TRAPS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "no address": (NODES, (), ("None:29533", "--main_process_ip")),
    "loopback": (NODES, ("--address", "localhost"), ("loopback", "127.0.0.1")),
    "no such host": (NODES, ("--address", "node0.invalid"), ("node0.invalid", "has no address")),
    "no rank": ({**NODES, "main_process_ip": "192.0.2.7"}, (), ("no machine_rank", "every node would be node 0")),
    "rank": (NODES, (*ADDRESS, "--rank", "2"), ("machine_rank is 2", "0 to 1")),
    "15 of 2": ({**NODES, "num_processes": 15}, ADDRESS, ("15", "7 on each, 14 in all", "take 14 or 16")),
    "nodes": (NODES, (*ADDRESS, "--nodes", "3"), ("num_processes 4", "num_machines 3")),
    "pdsh": ({**NODES, "deepspeed_config": {}}, ADDRESS, ("has no deepspeed_multinode_launcher", "pdsh", "standard")),
    "port 0": ({**NODES, "main_process_port": 0}, ADDRESS, ("main_process_port 0", "name one")),
    "gpu ids": ({**NODES, "gpu_ids": "0,1,2,3"}, ADDRESS, ("names 4 GPU(s)", "starts 2", "num_processes to 8")),
    "no nodes": (CPU, ("--nodes", "0"), ("--num_machines is 0", "1 or more")),
    "no port": (CPU, ("--port", "70000"), ("--main_process_port is 70000", "0 to 65535")),
    "use_cpu": ({**CPU, "use_cpu": True}, (), ("use_cpu", "for one process alone", "gpu_ids")),
    "affinity": ({**CPU, "enable_cpu_affinity": True}, (), ("enable_cpu_affinity", "command line alone")),
    "rendezvous": ({**NODES, "rdzv_backend": "c10d"}, ADDRESS, ("rdzv_backend", "give --rdzv_backend there")),
    "one process": ({**CPU, "distributed_type": "NO"}, (), ("starts one process, not 2",)),
    "batch": (CPU, ("--processes", "3", "--recipe", "tiny"), ("batch_size 128", "world size 3")),
    "recipe owns": (
        {**CPU, "deepspeed_config": {"gradient_accumulation_steps": 4}},
        (),
        ("gradient_accumulation_steps=4", "the recipe's fields"),
    ),
    "nvme": (
        {**CPU, "deepspeed_config": {"zero_stage": 3, "offload_optimizer_nvme_path": "/nvme"}},
        (),
        ("deepspeed_config.offload_optimizer_nvme_path", "without effect: leave it out"),
    ),
    "zero3 init": ({**CPU, "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True}}, (), ("zero3_init=true",)),
    "another type": (
        {**CPU, "distributed_type": "MULTI_GPU", "deepspeed_config": {"zero_stage": 2}},
        (),
        ("distributed_type MULTI_GPU", "does not read zero_stage"),
    ),
    "precision": ({**CPU, "mixed_precision": "fp16"}, ("--recipe", "tiny"), ("fp16", "engine.precision fp32")),
    "no gpu": ({**CPU, "gpu_ids": "0,1"}, (), ("GPUs 0,1", "none that torch can use")),
    "others' gpus": ({**CPU, "gpu_ids": "0,1"}, (), ("gpu_ids 0,1", "which is 2,3 here", "set gpu_ids to all")),
    "no data": (CPU, ("--recipe", "tiny", "--data", "/nowhere"), ("no folder /nowhere",)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(tmp_path: Path, lgp: Lgp, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate takes without a word is a problem in one sentence."""
    settings, options, words = TRAPS[name]
    if name in ("no gpu", "others' gpus"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if name == "no gpu" else "2,3")
    problems = found(lgp, write(tmp_path, settings), *options)["problems"]
    assert any(all(word in problem for word in words) for problem in problems), problems
    assert all(problem.endswith(".") and "\n" not in problem for problem in problems)


@pytest.mark.parametrize("name", ["cpu_2.yaml", "gpu_1.yaml", "gpu_8.yaml"])
def test_a_file_for_one_node_never_logs_in_to_others(name: str) -> None:
    """Started on two nodes, each starts its own ranks: no pdsh, which accelerate gives the whole environment in a file
    `.deepspeed_env`."""
    options = Given(num_machines=2, num_processes=16, main_process_ip="192.0.2.7", main_process_port=29533)
    nodes = plan(ROOT / "launch_configs" / name, options, 2, ("run", "tiny"))
    assert [node.rendezvous for node in nodes] == ["static 192.0.2.7:29533"] * 2
    assert [node.ranks for node in nodes] == [(0, 7), (8, 15)]


def test_the_multi_node_file_leaves_gpus_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    (node,) = plan(
        ROOT / "launch_configs" / "multinode.yaml", Given(machine_rank=0, main_process_ip="192.0.2.7"), 2, ()
    )
    assert "CUDA_VISIBLE_DEVICES" not in node.environment, "it stays 2,3"


def test_what_accelerate_does_not_read(tmp_path: Path) -> None:
    """The keys that are refused because they have no effect have none: the day accelerate reads them, this fails."""
    given, words = Given(main_process_ip="192.0.2.7", machine_rank=0), ("run", "tiny")
    (plain,) = plan(write(tmp_path, NODES), given, 2, words)
    changes = {"enable_cpu_affinity": True, "rdzv_backend": "c10d", "use_cpu": True, "same_network": True}
    assert plan(write(tmp_path, {**NODES, **changes}), given, 2, words) == [plain]
    (one,) = plan(write(tmp_path, {**CPU, "distributed_type": "NO", "use_cpu": True}), Given(), 1, words)
    assert one.environment["ACCELERATE_USE_CPU"] == "True" and one.world == 1


def test_all_problems_are_listed(tmp_path: Path, lgp: Lgp) -> None:
    """One line each, and what is wrong in the file does not hide what is wrong with the machine."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        path = write(tmp_path, {**CPU, "main_process_port": port, "num_proceses": 1, "use_cpu": 0})
        result = lgp("launch", "check", path)
    lines = [line for line in result.out.splitlines() if line.startswith("problem: ")]
    assert len(lines) == 3 and f"Port {port} is in use" in lines[-1]
    assert "3 problem(s)" in result.sentence
    assert not found(lgp, write(tmp_path, {**CPU, "main_process_port": port}))["problems"]
    section = {"zero_stage": 5, "deepspeed_multinode_laucher": "standard"}
    problems = found(lgp, write(tmp_path, {**NODES, "num_processes": 15, "deepspeed_config": section}))["problems"]
    words = ("deepspeed_multinode_laucher", "zero_stage to 5", "7 on each", "pdsh", "None:29533")
    assert len(problems) == len(words)
    assert all(any(word in problem for problem in problems) for word in words), problems


def test_disk(tmp_path: Path, lgp: Lgp) -> None:
    """The run directory's file system must take the checkpoints of the recipe: 47.83 M x 12 bytes x (2 + 2)."""
    small = Path("/proc")  # a file system without a free byte
    problems = found(lgp, write(tmp_path, CPU), "--recipe", "pool12", "--run-dir", f"{small}/run")["problems"]
    assert any("needs 2.3 GB" in problem and "0.0 GB left" in problem for problem in problems), problems


def test_a_stage_that_no_file_names_is_said(tmp_path: Path, lgp: Lgp) -> None:
    report = found(lgp, write(tmp_path, {**CPU, "deepspeed_config": {"gradient_clipping": None}}))
    assert report["notes"] == ["No file names a ZeRO stage: stage 1 is taken."]
    ddp = write(tmp_path, {**CPU, "distributed_type": "MULTI_GPU", "gpu_ids": "all", "deepspeed_config": {}})
    assert "does not read zero_stage" in found(lgp, ddp, "--zero-stage", "2")["notes"][0]


@pytest.mark.slow
def test_shared_memory(tmp_path: Path) -> None:
    """The 64 MiB that a container has by default are too few for NCCL, and enough without it."""
    small = ["unshare", "-Urm", "bash", "-c", 'mount -t tmpfs -o size=64m none /dev/shm && exec "$@"', "small"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("a smaller /dev/shm needs namespaces, which are not allowed here")
    gpu, cpu = ROOT / "launch_configs" / "gpu_8.yaml", ROOT / "launch_configs" / "cpu_2.yaml"
    for path, wanted in ((gpu, True), (cpu, False)):
        check = [sys.executable, "-m", "lgp_dist", "launch", "check", path]
        done = subprocess.run([*small, *check], capture_output=True, text=True, cwd=tmp_path)
        assert ("/dev/shm has 64 MiB, but NCCL wants 1024" in done.stdout) == wanted, done.stdout
        assert done.returncode == (2 if wanted else 0), done.stderr


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
        ({"zero_optimization": {"stage": 7}}, "stage"),
        ({"flops_profiler": {"enabled": "maybe"}}, "enabled"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
    ],
)
def test_a_deepspeed_file_goes_through_deepspeed(tmp_path: Path, lgp: Lgp, settings: dict[str, Any], word: str) -> None:
    """What it names is refused by this project's rules or by DeepSpeed's own validation."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings))
    path = write(tmp_path, {**CPU, "deepspeed_config": {"deepspeed_config_file": str(file)}})
    (problem,) = found(lgp, path)["problems"]
    assert word in problem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_files(lgp: Lgp, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shipped file passes, at every ZeRO stage that its command line may take."""
    monkeypatch.chdir(ROOT)
    nodes = read_launch_file(path)["num_machines"]
    options = ("--elsewhere", *(ADDRESS if nodes > 1 else ()))
    for stage in (0, 1, 2, 3):
        report = found(lgp, path, *options, "--zero-stage", str(stage))
        assert report["problems"] == [] and len(report["nodes"]) == nodes
        world = read_launch_file(path)["num_processes"]
        ranks = [rank for node in report["nodes"] for rank in range(node["ranks"][0], node["ranks"][1] + 1)]
        assert ranks == list(range(world)) and {node["world"] for node in report["nodes"]} == {world}
        if read_launch_file(path)["distributed_type"] == "DEEPSPEED":
            assert {node["environment"]["ACCELERATE_DEEPSPEED_ZERO_STAGE"] for node in report["nodes"]} == {str(stage)}


@pytest.mark.slow
def test_what_is_shown_is_what_runs(tmp_path: Path, lgp: Lgp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of real ranks under `accelerate launch` is what the check prints, and there are no others."""
    monkeypatch.chdir(ROOT)
    (node,) = found(lgp, Path("launch_configs/cpu_2.yaml"))["nodes"]
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(json.dumps(dict(os.environ)))\n"
    )
    call = [sys.executable, "-m", "accelerate.commands.launch", *node["command"][2:4], str(script)]
    subprocess.run(call, check=True, cwd=ROOT, env=os.environ, capture_output=True, timeout=LIMIT_S)
    first, last = node["ranks"]
    for rank in range(first, last + 1):
        environment = json.loads((tmp_path / str(rank)).read_text())
        assert environment["WORLD_SIZE"] == str(node["world"])
        assert {name: environment[name] for name in node["environment"]} == node["environment"]
    assert not (tmp_path / str(last + 1)).exists()


ODD: tuple[Any, ...] = (None, "", "7", 0, -1, 3, 1.5, True, [], ["a"], {}, {"a": 1}, "none", "no")


@pytest.mark.slow
@pytest.mark.parametrize("section", ["top", "deepspeed"])
def test_odd_values_are_never_a_traceback(tmp_path: Path, section: str) -> None:
    """Whatever stands at a key, a check ends with sentences, and plans nodes where it has none."""
    for key in [*TOP, "deepspeed_config", *REFUSED] if section == "top" else [*DEEPSPEED]:
        for value in ODD:
            changed = (
                {key: value} if section == "top" else {"deepspeed_config": {**NODES["deepspeed_config"], key: value}}
            )
            path = write(tmp_path, {**NODES, **changed})
            report = check_file(path, Given(main_process_ip="192.0.2.7"), Demand())
            assert bool(report.nodes) or bool(report.problems), (key, value)
            assert all(problem.endswith(".") and "\n" not in problem for problem in report.problems), report.problems
