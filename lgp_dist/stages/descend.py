"""Stage descend: the best path within a budget, as a standalone model."""

import logging
import time
from pathlib import Path

from lgp_dist.engine.progress import shown
from lgp_dist.export.choice import choose
from lgp_dist.export.latency import NAME, LatencyFile, with_path_latencies
from lgp_dist.files import write_json
from lgp_dist.models.descendant import descendant_from_path
from lgp_dist.run.path_rows import PathRow, read_rows
from lgp_dist.run.tensors import save_tensors
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")


def run(context: Context) -> None:
    """Writes descend/descendant.json and descend/model.safetensors."""
    began = time.monotonic()
    evaluated, tuned = context.require("evaluate"), context.require("finetune")
    rows = read_rows(evaluated.folder / "paths.json")
    budget = context.config.budget

    def fill(folder: Path) -> PathRow:
        timed, space, heads = rows, context.space, context.heads
        if budget.max_latency_ms:
            workers, file = context.workers, LatencyFile(context.run.root / NAME, tuned.id)
            watched = shown(workers.watchdog.over(rows), workers.is_main, "descend: latency", len(rows), "path")
            timed = with_path_latencies(watched, space, heads, budget, file)
        chosen = choose(timed, budget)
        model = descendant_from_path(context.load_pool(tuned).cpu(), heads, space.by_key(chosen["key"]))
        save_tensors(folder / "model.safetensors", model.state_dict())
        write_json(folder / "descendant.json", chosen)
        log.info("descend: %s, %d parameters, top-1 %.2f %%", chosen["key"], chosen["params"], chosen["top1"])
        return chosen

    context.write("descend", [evaluated, tuned], fill, time.monotonic() - began)
