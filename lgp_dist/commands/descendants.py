"""`lgp descend RUN` and `lgp export RUN`: the best path of a finished run within a budget, and any path as a folder."""

import json
from functools import partial
from pathlib import Path

from lgp_dist.commands.finished import FinishedRun
from lgp_dist.config.budget import Budget
from lgp_dist.config.flat import flatten
from lgp_dist.data.remote.roots import load_manifest
from lgp_dist.engine.workers import Workers
from lgp_dist.export.choice import choose, limits_of
from lgp_dist.export.folder import told
from lgp_dist.export.latency import NAME, LatencyFile, with_path_latencies
from lgp_dist.files import replace_folder
from lgp_dist.paths.space import heads_of, space_of
from lgp_dist.report.choice import choice_figure
from lgp_dist.report.plots import save_figure
from lgp_dist.report.rows import amount
from lgp_dist.run.path_rows import PathRow
from lgp_dist.run.provenance import environment
from lgp_dist.stages import export
from lgp_dist.stages.context import Context


def choose_of_run(run: FinishedRun, rows: list[PathRow], budget: Budget, *, plot: bool) -> PathRow:
    """The row of the best path of a run within a budget, with its latency, as paths.json and `with_latencies` have it.

    Latencies that rows lack are measured for all paths where a limit or a plot needs them, else for the choice alone,
    and kept in RUN/latency.json. rows: of all evaluated paths. plot: also writes RUN/descend.png and descend.svg.
    """
    space, heads = space_of(run.config), heads_of(run.config)
    file = LatencyFile(run.root / NAME, run.evaluated.record["inputs"]["finetune"])

    def timed(some: list[PathRow]) -> list[PathRow]:
        return with_path_latencies(some, space, heads, budget, file)

    if "latency_ms" not in rows[0] and (plot or budget.max_latency_ms):
        rows = timed(rows)
    chosen = choose(rows, budget, "--")
    if plot:
        save_figure(choice_figure(rows, chosen, limits_of(budget)), run.root / "descend")
    return chosen if "latency_ms" in chosen else timed([chosen])[0]


def choice_text(run: Path, row: PathRow, *, plot: bool) -> str:
    """What a person is told of the choice."""
    low, high = row.get("latency_low_ms"), row.get("latency_high_ms")
    spread = f" (median; 10 % of the measurements are below {low:.3f}, 10 % above {high:.3f})" if low and high else ""
    lines = [
        f"{row['key']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %",
        f"  weighs  {amount(row['params'])} parameters",
        f"  costs   {amount(row['flops'])} multiply-adds an image",
        f"  takes   {row['latency_ms']:.3f} ms{spread}",
        f"          on {row['latency_on']}",
    ]
    if plot:
        lines.append(f"  drawn   in {run / 'descend.png'} and descend.svg")
    return "\n".join([*lines, f"To write it: lgp export {run} --path {row['key']} --out FOLDER"])


def export_of_run(run: FinishedRun, out: Path, rows: list[PathRow]) -> str:
    """Writes the path that run.config.export names as a descendant's folder, and says so.

    rows: of the paths to write as one pool in place of it; empty for none.
    """
    workers = Workers.start(run.config.engine)
    manifest, settings = load_manifest(run.config.data), flatten(run.config)
    context = Context(run.config, settings, run.directory, workers, manifest, environment())
    tuned, evaluated, key = context.require("finetune"), context.require("evaluate"), run.config.export.path
    if rows:
        replace_folder(out, partial(export.fill_pool, context, tuned, evaluated, rows))
    else:
        replace_folder(out, partial(export.fill, context, tuned, evaluated, key))
    workers.close()
    verdict = json.loads((out / "verify.json").read_text())
    what = f"{len(rows)} paths" if rows else key
    return "\n  ".join([f"{out}: {what}; README.md in it says how to load it", *told(verdict)])
