"""Stage finetune: all paths of the pool, each rank on its own."""

import logging
import time
from functools import partial
from pathlib import Path

from torch import nn

from lgp_dist.engine.loop import TrainingPlan
from lgp_dist.files import write_json
from lgp_dist.models.ancestry import load_weights
from lgp_dist.models.build import prepare_ancestry
from lgp_dist.paths.cost import ancestry_forward, work
from lgp_dist.paths.ledger import Ledger, build_ledger, under_drawn
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.run.artifacts import Artifact
from lgp_dist.run.facts import FinetuneFacts
from lgp_dist.run.metrics import read_metrics
from lgp_dist.run.tensors import load_tensors, save_tensors
from lgp_dist.stages.context import Context
from lgp_dist.tasks.finetune import finetune_task

log = logging.getLogger("lgp")


def run(context: Context) -> None:
    """Writes finetune/pool.safetensors and, where the pool was trained, finetune/ledger.json."""
    began, config = time.monotonic(), context.config.finetune
    needed = ("ancestry", "pool") if context.config.needs_ancestry else ("pool",)
    inputs = {stage: context.require(stage) for stage in needed}
    if config.weights:
        taken = partial(take, context, inputs["pool"], config.weights)
        context.write("finetune", inputs.values(), taken, time.monotonic() - began)
        return
    ancestry = None
    if context.config.teaches_paths:
        ancestry = prepare_ancestry(context.load_ancestry(inputs["ancestry"]), context.config, "finetune")
    pool = context.starting_pool(inputs["pool"], training=True)
    context.seed("finetune")
    sampler = PathSampler.from_config(context.config, context.space)
    if config.policy == "balanced" and config.meet == "step" and meets_in_micro_steps(context):
        log.warning("finetune: under this engine ranks wait in every micro-step; --finetune.meet micro_step saves time")
    plan = TrainingPlan(
        finetune_task(context.config, pool, ancestry, sampler),
        config.train,
        gradients=config.gradients,
        rates={module: factor for row, factor in enumerate(config.row_lr) for module in pool.row_modules(row)},
        watch=partial(measure, context),
        watch_every=config.watch_every,
    )
    training = context.train("finetune", plan, uses=config.paths_per_batch)

    def fill(folder: Path) -> FinetuneFacts:
        save_tensors(folder / "pool.safetensors", pool.state_dict())
        ledger = draws_of(context.run.root / "metrics.jsonl", sampler)
        write_json(folder / "ledger.json", ledger)
        if late := under_drawn(ledger):
            log.warning("finetune: %d path(s) were drawn less often than expected: %s", len(late), ", ".join(late))
        images, flops = training["steps"] * config.train.batch_size, mean_flops(context, ledger)
        cost = work(images, config.paths_per_batch * flops, ancestry_forward(context.config))
        return {"training": {**training, "flops": cost}, "policy": config.policy, "behind": late}

    context.write("finetune", inputs.values(), fill, time.monotonic() - began)


def take(context: Context, pooled: Artifact, weights: str, folder: Path) -> FinetuneFacts:
    """Writes the pool with weights from a file; UserError if they are those of another pool."""
    pool = context.load_pool(pooled)
    load_weights(pool, load_tensors(Path(weights)), weights, "pool", "model and data.num_classes")
    save_tensors(folder / "pool.safetensors", pool.state_dict())
    return {"weights": weights, "weights_sha256": context.run.settings["finetune.weights"]}


def meets_in_micro_steps(context: Context) -> bool:
    """Whether ranks exchange gradients several times in an optimizer step."""
    workers, train = context.workers, context.config.finetune.train
    reduces = workers.launch.zero_stage >= 2 and workers.engine.reduction == "all"
    return workers.world > 1 and train.accumulate > 1 and reduces


def measure(context: Context, pool: nn.Module) -> dict[str, float]:
    """Top-1 of every path that is trained, meanwhile, on a part of the validation split, as `top1/KEY`."""
    forwards = {path.key: partial(pool, path=path) for path in context.space.chosen(context.config.finetune.only)}
    found = context.accuracies(forwards, context.config.finetune.watch_images)
    return {f"top1/{key}": top1 for key, (top1, _) in found.items()}


def mean_flops(context: Context, ledger: Ledger) -> float:
    """FLOPs of one image's forward, averaged over the paths that were drawn."""
    flops = {path.key: context.space.cost(path).flops for path in context.space.paths}
    return sum(path["share"] * flops[path["key"]] for path in ledger["paths"] if path["draws"])


def draws_of(metrics: Path, sampler: PathSampler) -> Ledger:
    """The ledger of the stage's lines in a metrics file."""

    def shares(world: int) -> dict[str, float]:
        return {path.key: share for path, share in sampler.shares(world).items()}

    return build_ledger(read_metrics(metrics, "finetune"), shares, sampler.tied_slots, sampler.accumulate)
