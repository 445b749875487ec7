"""Stage evaluate: accuracy and cost of every path that was trained."""

import logging
import time
from functools import partial
from pathlib import Path

from lgp_dist.engine.evaluate import Forward
from lgp_dist.files import write_json
from lgp_dist.models.pool import LearngenePool, SharedForwards
from lgp_dist.run.facts import EvaluateFacts
from lgp_dist.run.path_rows import PathRow
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")


def run(context: Context) -> None:
    """Writes evaluate/paths.json and, unless `evaluate.before` is off, before.json: the pool before fine-tuning."""
    began = time.monotonic()
    pooled, tuned = context.require("pool"), context.require("finetune")
    rows = path_rows(context, context.load_pool(tuned), "evaluate: accuracy")
    earlier = "evaluate: accuracy before fine-tuning"
    before = path_rows(context, context.starting_pool(pooled), earlier) if context.config.evaluate.before else None
    best = max(rows, key=lambda row: row["top1"])
    log.info("evaluate: %d paths, best %s with top-1 %.2f %%", len(rows), best["key"], best["top1"])

    def fill(folder: Path) -> EvaluateFacts:
        write_json(folder / "paths.json", rows)
        if before is not None:
            write_json(folder / "before.json", before)
        return {"best": best["key"], "best_top1": best["top1"]}

    context.write("evaluate", [pooled, tuned], fill, time.monotonic() - began)


def path_rows(context: Context, pool: LearngenePool, what: str) -> list[PathRow]:
    """A row for every path, or those of `finetune.only`, cheapest first. what: is measured, in words."""
    chosen = context.space.chosen(context.config.finetune.only)
    forwards: dict[str, Forward] = {path.key: partial(pool, path=path) for path in chosen}
    if pool.skippable_modules:  # otherwise every path runs a part of every module, and paths have nothing in common
        shared = SharedForwards(pool)
        forwards = {path.key: partial(shared, path=path) for path in sorted(chosen, key=shared.route)}
    measured = context.accuracies(forwards, what=what)
    rows: list[PathRow] = []
    for path in chosen:
        top1, top5 = measured[path.key]
        rows.append({**context.space.describe(path), "top1": round(top1, 4), "top5": round(top5, 4)})
    return sorted(rows, key=lambda row: row["flops"])
