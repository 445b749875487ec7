"""Stage distil: the ancestry into all auxiliary models, in one run."""

import logging
import time
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from lgp_dist.artifacts import save_tensors
from lgp_dist.costs import ancestry_flops, work
from lgp_dist.engine.optim import decays_matrix
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.stages.context import Context
from lgp_dist.tasks.distil import DistilTask

log = logging.getLogger("lgp")


def decays(name: str, parameter: Parameter) -> bool:
    """Transformations are not decayed: with a free W, decay would shrink the targets."""
    return ".bank." not in name and decays_matrix(name, parameter)


def run(context: Context) -> None:
    """Writes distil/rows.safetensors: every row's ViT and transformations."""
    began, artifact = time.monotonic(), context.require("ancestry")
    ancestry = context.load_ancestry()
    context.seed("distil")
    rows = build_rows(
        context.space, context.config.model.rows, context.config.distil, ancestry.depth, ancestry.vit.embed_dim
    )
    module = AuxiliaryRows(rows)
    training = context.train(
        "distil", DistilTask(module, ancestry, context.config.distil), context.config.distil.train, decays
    )
    alone = sum(context.space.cost(path).flops for path in context.space.paths if path.stitch is None)
    images = training["steps"] * context.config.distil.train.batch_size
    training |= {"flops": work(images, alone, ancestry_flops(context.config))}
    module.eval()
    measured = context.accuracies({str(index): row.vit for index, row in enumerate(module.rows)})
    facts: dict[str, Any] = {"training": training, "rows": []}
    for row, (top1, top5) in zip(context.config.model.rows, measured.values(), strict=True):
        facts["rows"].append({"width": row.width, "top1": top1, "top5": top5})
        log.info("distil: row of width %d: top-1 %.2f %%, top-5 %.2f %%", row.width, top1, top5)

    def fill(folder: Path) -> dict[str, Any]:
        save_tensors(folder / "rows.safetensors", module.state_dict())
        return facts

    context.write("distil", [artifact], fill, time.monotonic() - began)
