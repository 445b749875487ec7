"""`lgp finetune-descendant`: a descendant trained on another data set, with a new head, as a folder again."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

import lgp_dist.timm_models  # noqa: F401  makes stitched paths known to timm
from lgp_dist.commands.exported import completed, read_config
from lgp_dist.config.budget import Budget
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.stream import check_batch
from lgp_dist.engine.loop import TrainingPlan
from lgp_dist.errors import UserError
from lgp_dist.export.folder import Exported, told, write_folder
from lgp_dist.export.latency import NAME, LatencyFile, with_latencies
from lgp_dist.files import replace_folder
from lgp_dist.models.descendant import exported_config
from lgp_dist.stages.context import Context
from lgp_dist.stages.export import batches_of
from lgp_dist.stages.start import joined, recorded
from lgp_dist.tasks.classify import ClassifyTask

log = logging.getLogger("lgp")

STAGE = "downstream"
"""Its name in metrics, checkpoints and outcome.json."""


def finetune_descendant(folder: Path, config: RunConfig) -> None:
    """Trains an exported descendant with a new head, by finetune.train, and writes RUN/export; resumes as a run does.

    config: input, normalisation and shape are the folder's; with data.num_classes 0 there are as many classes as the
    shards' manifest names. UserError for what a person can put right.
    """
    refusal = None
    try:
        config = completed(folder, config)
    except UserError as error:  # on this rank; the others must hear of it
        config, refusal = replace(config, data=replace(config.data, num_classes=1000)), error
    with joined(config, (STAGE,), refusal) as context:
        check_batch(config.finetune.train, context.workers.world, context.train_images, "train.")
        with recorded(context, STAGE) as context:
            _work(context, folder)


def new_headed(folder: Path, classes: int) -> nn.Module:
    """The folder's model with a classifier that begins anew, drawn from torch's seed."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=classes)
    head = model.get_submodule(model.pretrained_cfg["classifier"])
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return model


def _work(context: Context, folder: Path) -> None:
    """Trains on every rank; rank 0 writes the folder."""
    config, root, classes = context.config, context.run.root, context.config.data.num_classes
    described = read_config(folder)
    context.workers.watchdog.begin(STAGE)
    context.seed(STAGE)
    model = new_headed(folder, classes)
    context.train(STAGE, TrainingPlan(ClassifyTask(model), config.finetune.train))
    top1, top5 = context.accuracies({STAGE: model.to(context.workers.device).eval()})[STAGE]
    log.info("%s: top-1 %.2f %%, top-5 %.2f %%", STAGE, top1, top5)
    context.workers.watchdog.phase("export")
    if context.workers.is_main:
        row = _row(described, model, classes) | {"top1": round(top1, 4), "top5": round(top5, 4)}
        replace_folder(root / "export", lambda into: _export(context, described, model.cpu(), row, into))
    context.workers.barrier()


def _row(described: dict[str, Any], model: nn.Module, classes: int) -> dict[str, Any]:
    """Key, parameters and FLOPs of the model with its new head."""
    shape, before = described["lgp"]["shape"], described["lgp"]["measured"]
    more = (classes - shape["num_classes"]) * shape["segments"][-1]["width"]
    params = sum(parameter.numel() for parameter in model.parameters())
    return {"key": before["key"], "params": params, "flops": before["flops"] + more}


def _export(
    context: Context,
    described: dict[str, Any],
    model: nn.Module,
    row: dict[str, Any],
    into: Path,
) -> dict[str, Any]:
    data, sources = context.config.data, context.run.settings
    shape_id = f"{sources['finetune.weights']}, {data.num_classes} classes"
    image, file = (data.channels, data.image_size, data.image_size), LatencyFile(context.run.root / NAME, shape_id)
    (timed,) = with_latencies([row], lambda key: copy.deepcopy(model), image, Budget(), file)
    about = described["lgp"] | {"measured": row, "from": sources["finetune.weights"]}
    arguments = dict(described["model_args"])
    for holder in (about, arguments):
        if "space" in holder:
            holder["space"] = holder["space"] | {"num_classes": data.num_classes}
    exported = Exported(
        model=model,
        config=exported_config(model, data, arguments, about, context.manifest.classes),
        facts=timed,
        origin={
            "trained pool (artifact finetune)": about.get("pool", "not known"),
            "sha256 of the descendant it began as": sources["finetune.weights"],
            "fingerprint of the training split": sources[f"data.{data.train_split}"],
            "commit of lgp_dist": context.environment["commit"] or "none: not a checkout",
        },
    )
    verdict = write_folder(into, exported, context.config.export, batches_of(context), model)
    for line in told(verdict):
        log.info("%s: %s", STAGE, line)
    return verdict
