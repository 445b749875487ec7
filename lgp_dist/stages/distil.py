"""Stage distil: all auxiliary models, distilled from the ancestry in one run or made as `RowConfig.source` says."""

import logging
import time
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch.nn import Parameter

from lgp_dist.engine.loop import TrainingPlan
from lgp_dist.engine.optim import decays_matrix
from lgp_dist.files import sha256
from lgp_dist.models.ancestry import (
    Ancestry,
    adapted_weights,
    hub_weights,
    load_weights,
    timm_model,
    without_wrappers,
)
from lgp_dist.models.build import auxiliary_rows, model_input
from lgp_dist.models.row_start import check_row, plain_weights, select_weights, take_tail
from lgp_dist.paths.cost import ancestry_flops, trained_rows_flops, work
from lgp_dist.run.facts import DistilFacts, RowFacts
from lgp_dist.run.tensors import load_tensors, save_tensors
from lgp_dist.stages.context import Context
from lgp_dist.tasks.distil import distil_task

log = logging.getLogger("lgp")


def decays(name: str, parameter: Parameter) -> bool:
    """Transformations are not decayed: with a free W, decay would shrink the targets."""
    return ".bank." not in name and decays_matrix(name, parameter)


def run(context: Context) -> None:
    """Writes distil/rows.safetensors: every row's ViT and transformations."""
    began, config = time.monotonic(), context.config
    inputs = [context.require("ancestry")] if config.makes_rows_of_ancestry else []
    ancestry = context.load_ancestry(*inputs) if inputs else None
    context.seed("distil")
    module = auxiliary_rows(config, ancestry)
    facts: DistilFacts = {"rows": [start(context, row.number, row.vit, ancestry) for row in module.rows]}
    task = distil_task(config, module.rows, ancestry)
    if len(task.module.rows):
        training = context.train("distil", TrainingPlan(task, config.distil.train, decays=decays))
        images = training["steps"] * config.distil.train.batch_size
        frozen = ancestry_flops(config) if task.ancestry else 0.0
        facts["training"] = {**training, "flops": work(images, trained_rows_flops(config), frozen)}
    module.to(context.workers.device).eval()
    measured = context.accuracies({str(index): row.vit for index, row in enumerate(module.rows)})
    for row, (top1, top5) in zip(facts["rows"], measured.values(), strict=True):
        row |= {"top1": top1, "top5": top5}
        log.info("distil: row of width %d: top-1 %.2f %%, top-5 %.2f %%", row["width"], top1, top5)

    def fill(folder: Path) -> DistilFacts:
        save_tensors(folder / "rows.safetensors", module.state_dict())
        return facts

    context.write("distil", inputs, fill, time.monotonic() - began)


def start(context: Context, number: int, vit: VisionTransformer, ancestry: Ancestry | None) -> RowFacts:
    """Gives a row the weights that its source has for a start. Every rank calls it."""
    config, key = context.config, f"model.rows.{number}"
    row = config.model.rows[number]
    facts: RowFacts = {"width": row.width, "source": row.source}
    if row.start == "ancestry":
        select_weights(vit, ancestry.vit, key)
    if row.source == "tail":
        take_tail(vit, ancestry.vit, key)
    if row.source not in ("hub", "file"):
        return facts
    weights, name, digest = Path(row.weights), row.weights, context.run.settings.get(f"{key}.weights")
    if row.source == "hub":
        stock = timm_model(row.model, key, "row", **model_input(config))
        check_row(vit, stock, row.model, key)
        weights, name = hub_weights(stock, key), stock.pretrained_cfg["hf_hub_id"]
        digest = context.workers.once_per_node(lambda: sha256(weights))
    settings = f"{key}.width, {key}.depth and data.num_classes (a row is a plain ViT with one class token)"
    state = without_wrappers(load_tensors(weights), str(weights))
    plain = plain_weights(state)
    adapted = adapted_weights(vit, plain, head=True)
    changed = [name for name in adapted if name in plain and adapted[name].shape != plain[name].shape]
    if changed:
        log.info("distil: row %d: timm's functions adapted to its input: %s", number, ", ".join(changed))
    load_weights(vit, adapted, str(weights), f"row {number}", settings)
    return {**facts, "weights": name, "weights_sha256": digest}
