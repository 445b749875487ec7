"""A finished run as a catalogue: the best path within a budget, and any path as a folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lgp_dist.config.budget import Budget
from lgp_dist.config.flat import flatten, unflatten
from lgp_dist.config.run_config import ExportConfig, RunConfig
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.export.choice import choose, limits_of
from lgp_dist.export.folder import told
from lgp_dist.export.latency import NAME, LatencyFile, with_path_latencies
from lgp_dist.files import replace_folder
from lgp_dist.paths.space import heads_of, space_of
from lgp_dist.report.choice import choice_figure
from lgp_dist.report.plots import save_figure
from lgp_dist.report.rows import amount
from lgp_dist.run.artifacts import Artifact, RunDirectory
from lgp_dist.run.checks import check_config
from lgp_dist.run.provenance import git_commit
from lgp_dist.stages import export
from lgp_dist.stages.context import Context


def evaluated_run(run: Path) -> Artifact:
    """The evaluation of a run directory; UserError where it has none that is whole."""
    found = RunDirectory(run).find("evaluate") if run.is_dir() else None
    if found is None:
        what = "holds no evaluated run" if run.is_dir() else "is neither a recipe nor the directory of a run"
        raise UserError(f"{run} {what}: name a run directory in which `lgp evaluate` is complete, or a recipe.")
    found.check_files()
    return found


def config_of(run: Path, evaluated: Artifact, **changed: Any) -> tuple[RunConfig, dict[str, str]]:
    """The settings with which a run directory's evaluation was made, and some that differ, and the fingerprints of what
    the run read; UserError where a value is out of range."""
    made = evaluated.record["config"]
    settings = flatten(unflatten(made), with_runtime_only=False).keys() & made.keys()
    sources = {name: value for name, value in made.items() if name not in settings}
    kept = _kept(run / "config.json")
    config = unflatten(kept | {name: made[name] for name in settings})
    config = replace(config, run_dir=str(run), force=False, **changed)
    check_config(config)
    return config, sources


def _kept(path: Path) -> dict[str, Any]:
    """Settings of a run's latest start."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): put back what the run wrote.") from None


def choose_of_run(run: Path, budget: Budget, *, plot: bool) -> dict[str, Any]:
    """The row of the best path of a run within a budget, with its latency, as paths.json and `with_latencies` have it.

    Latencies are measured where a limit or a plot asks for all, else for the choice alone, and kept in
    RUN/latency.json. plot: also writes RUN/descend.png and descend.svg.
    """
    evaluated = evaluated_run(run)
    config, _ = config_of(run, evaluated, budget=budget)
    space, heads = space_of(config), heads_of(config)
    file = LatencyFile(run / NAME, evaluated.record["inputs"]["finetune"])
    rows = json.loads((evaluated.folder / "paths.json").read_text())

    def timed(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return with_path_latencies(some, space, heads, budget, file)

    if plot or budget.max_latency_ms:
        rows = timed(rows)
    chosen = choose(rows, budget, "--")
    if plot:
        save_figure(choice_figure(rows, chosen, limits_of(budget)), run / "descend")
    return chosen if "latency_ms" in chosen else timed([chosen])[0]


def choice_text(run: Path, row: dict[str, Any], *, plot: bool) -> str:
    """What a person is told of the choice."""
    lines = [
        f"{row['key']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %",
        f"  weighs  {amount(row['params'])} parameters",
        f"  costs   {amount(row['flops'])} multiply-adds an image",
        f"  takes   {row['latency_ms']:.3f} ms (median; a tenth of the measurements below {row['latency_low_ms']:.3f}, "
        f"a tenth above {row['latency_high_ms']:.3f})",
        f"          on {row['latency_on']}",
    ]
    if plot:
        lines.append(f"  drawn   in {run / 'descend.png'} and descend.svg")
    return "\n".join([*lines, f"To write it: lgp export {run} --path {row['key']} --out FOLDER"])


def export_of_run(run: Path, out: Path, settings: ExportConfig, root: str = "") -> str:
    """Writes a path of a run as a descendant's folder and says so; UserError where the folder has files already.

    settings: with the path's key. root: of the run's shards, where it is not the one that the run names.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another --out, or remove it.")
    config, sources = config_of(run, evaluated_run(run), export=settings)
    data, engine = replace(config.data, root=root or config.data.root), replace(config.engine, device="auto")
    config = replace(config, data=data, engine=engine)
    workers = Workers.start(config.engine)
    context = Context(config, RunDirectory(run, sources), workers, git_commit())
    replace_folder(out, lambda folder: export.fill(context, settings.path, folder))
    workers.close()
    verdict = json.loads((out / "verify.json").read_text())
    return "\n  ".join([f"{out}: {settings.path}; README.md in it says how to load it", *told(verdict)])
