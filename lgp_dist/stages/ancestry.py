"""Stage ancestry: the frozen teacher, trained here, read from a file, or taken from the hub."""

import logging
import time
from pathlib import Path

from lgp_dist.engine.loop import TrainingPlan
from lgp_dist.files import sha256
from lgp_dist.models.ancestry import check_normalisation, hub_weights, load_weights
from lgp_dist.models.build import ancestry_vit
from lgp_dist.paths.cost import ancestry_flops, work
from lgp_dist.run.facts import AncestryFacts
from lgp_dist.run.tensors import load_tensors, save_tensors
from lgp_dist.stages.context import Context
from lgp_dist.tasks.classify import ClassifyTask

log = logging.getLogger("lgp")


def run(context: Context) -> None:
    """Writes ancestry/ancestry.safetensors under timm's names, and its accuracy."""
    config, began = context.config, time.monotonic()
    ancestry = config.ancestry
    facts: AncestryFacts = {"source": ancestry.source}
    context.seed("ancestry")
    vit = ancestry_vit(config)
    if ancestry.source == "hub":
        check_normalisation(vit, config.data.mean, config.data.std)
        weights = hub_weights(vit)
        load_weights(vit, load_tensors(weights), str(weights))
        digest = context.workers.once_per_node(lambda: sha256(weights))
        facts |= {"weights": vit.pretrained_cfg["hf_hub_id"], "weights_sha256": digest}
    if ancestry.source == "file":
        load_weights(vit, load_tensors(Path(ancestry.weights)), ancestry.weights)
        facts |= {"weights": ancestry.weights}
    if ancestry.source == "train":
        training = context.train("ancestry", TrainingPlan(ClassifyTask(vit), ancestry.train))
        images = training["steps"] * ancestry.train.batch_size
        facts["training"] = {**training, "flops": work(images, ancestry_flops(config))}
    vit.to(context.workers.device).eval()
    top1, top5 = context.accuracies({"ancestry": vit})["ancestry"]
    facts |= {"top1": top1, "top5": top5, "params": sum(parameter.numel() for parameter in vit.parameters())}
    log.info("ancestry: top-1 %.2f %%, top-5 %.2f %%, %.2f M parameters", top1, top5, facts["params"] / 1e6)

    def fill(folder: Path) -> AncestryFacts:
        save_tensors(folder / "ancestry.safetensors", vit.state_dict())
        return facts

    context.write("ancestry", [], fill, time.monotonic() - began)
