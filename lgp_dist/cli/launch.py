"""`lgp launch check FILE`: what a launch file would start, and what is wrong with it."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.launch.file import read_launch_file
from lgp_dist.errors import UserError
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import recipe_of

if TYPE_CHECKING:
    from lgp_dist.engine.launch.check import Demand, Report

BYTES_PER_PARAMETER = 12
"""Bytes of a checkpoint per parameter: weight and two moments, 4 bytes each."""


@dataclass(frozen=True)
class Check:
    """Check a launch file and print what each node will run; status 2 if something is wrong."""

    file: Annotated[Path, tyro.conf.Positional]
    """An accelerate file, such as launch_configs/multinode.yaml."""
    nodes: int | None = None
    """As accelerate's --num_machines."""
    processes: int | None = None
    """As accelerate's --num_processes: ranks over all nodes."""
    address: str | None = None
    """As accelerate's --main_process_ip: node 0, as other nodes reach it."""
    port: int | None = None
    """As accelerate's --main_process_port."""
    rank: int | None = None
    """As accelerate's --machine_rank; all nodes are shown without it."""
    zero_stage: int | None = None
    """As accelerate's --zero_stage."""
    recipe: str = ""
    """Recipe to run: also check its batches, shards and space for checkpoints."""
    data: str = ""
    """Another data.root than the recipe's."""
    run_dir: str = ""
    """Another run directory than the recipe's."""
    elsewhere: bool = False
    """This machine is not one of the nodes: do not check its port, GPUs, memory, disk and shards."""
    json: bool = False
    """Print JSON."""


def run_launch(action: Check) -> None:
    """Prints what each node will run, notes and problems; UserError where there are problems."""
    if action.data and not action.recipe:
        raise UserError("--data is for a recipe's shards, but there is no --recipe: name one, or leave --data out.")
    config = _recipe(action)
    read_launch_file(action.file)
    from lgp_dist.engine.launch.check import check_file  # torch, accelerate and deepspeed
    from lgp_dist.engine.launch.plan import Given

    given = Given(action.nodes, action.processes, action.rank, action.address, action.port, action.zero_stage)
    report = check_file(action.file, given, _demand(action, config), here=not action.elsewhere)
    if config is not None and report.nodes and not action.elsewhere:
        problems, notes = _data(config, report.nodes[0].world)
        report = replace(report, problems=report.problems + problems, notes=report.notes + notes)
    if action.json:
        sys.stdout.write(json.dumps({**asdict(report), "file": str(report.file)}, indent=2) + "\n")
    else:
        sys.stdout.write(_text(report))
    if report.problems:
        raise UserError(f"{action.file} has {len(report.problems)} problem(s), listed above: fix them first.")


def _recipe(action: Check) -> RunConfig | None:
    """The recipe to run, if one is named."""
    if not action.recipe:
        return None
    config = replace(recipe_of(action.recipe), run_dir=action.run_dir)
    return replace(config, data=replace(config.data, root=action.data or config.data.root))


def _demand(action: Check, config: RunConfig | None) -> "Demand":
    """What the recipe needs of the launch."""
    from lgp_dist.engine.launch.check import Demand

    if config is None:
        return Demand(run_dir=Path(action.run_dir) if action.run_dir else None)
    copies = config.checkpoint.keep + 2  # the best measured, and the one that is being written
    options = [
        f"--{name}={value}" for name, value in (("data.root", action.data), ("run-dir", action.run_dir)) if value
    ]
    return Demand(
        engine=config.engine,
        train=config.finetune.train,
        arguments=("run", action.recipe, *options),
        run_dir=Path(config.directory),
        run_bytes=space_of(config).stored_params * BYTES_PER_PARAMETER * copies,
    )


def _data(config: RunConfig, world: int) -> tuple[list[str], list[str]]:
    """Problems and notes of shards and batches at so many ranks."""
    from lgp_dist.data.remote.roots import open_root
    from lgp_dist.data.shards.manifest import ShardManifest  # torch, as above
    from lgp_dist.stages.start import check_world

    problems = []
    try:
        root = open_root(config.data)
        manifest = ShardManifest.load(root.folder)
        root.open_index(manifest, config.data.train_split)
        root.open_index(manifest, config.data.val_split)
        shards = manifest.entries(config.data.train_split)
    except UserError as error:
        return [str(error)], []
    for stage in STAGES:
        try:
            check_world(config, (stage,), world, sum(entry.samples for entry in shards))
        except UserError as error:
            problems.append(str(error))
    threads = world * max(1, config.data.threads)
    note = (
        f"{len(shards)} shard(s) of split {config.data.train_split} for {threads} reading threads ({world} rank(s) of "
        f"{max(1, config.data.threads)}): several threads read one shard at a time, which a slow network file system "
        "may feel; `lgp shards reshard` makes more."
    )
    return problems, [note] if len(shards) < threads else []


def _text(report: "Report") -> str:
    """Nodes, notes and problems in lines."""
    lines = []
    for node in report.nodes:
        first, last = node.ranks
        lines += [
            f"node {node.rank}: {shlex.join(node.command)}",
            f"  rank {first} to {last} of {node.world}: {shlex.join(node.process)}",
            *([f"  rendezvous: {node.rendezvous}"] if node.rendezvous else []),
            *(f"  {name}={shlex.quote(value)}" for name, value in sorted(node.environment.items())),
        ]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"problem: {problem}" for problem in report.problems] or [f"{report.file}: ok"]
    return "\n".join(lines) + "\n"
