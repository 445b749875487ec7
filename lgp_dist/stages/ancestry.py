"""Stage ancestry: the frozen teacher, trained here, read from a file or taken from the hub; perhaps with a new head."""

import logging
import sys
import time
from pathlib import Path

import torch
from torch import nn

from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.loop import TrainingPlan
from lgp_dist.errors import UserError
from lgp_dist.files import sha256
from lgp_dist.models.ancestry import Ancestry, adapted_weights, hub_weights, load_weights
from lgp_dist.models.ancestry_adapter import fit_classifier
from lgp_dist.models.build import ancestry_of, ancestry_vit
from lgp_dist.models.pretrained import check_images
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
    if ancestry.source == "train":
        training = context.train("ancestry", TrainingPlan(ClassifyTask(vit), ancestry.train))
        images = training["steps"] * ancestry.train.batch_size
        facts["training"] = {**training, "flops": work(images, ancestry_flops(config))}
    teacher = ancestry_of(config, vit)  # it freezes the model, so only now
    for line in describe(config, teacher):
        log.info("ancestry: %s", line)
    if ancestry.source == "hub":
        weights = hub_weights(vit)
        take_weights(config, vit, weights)
        digest = context.workers.once_per_node(lambda: sha256(weights))
        facts |= {"weights": vit.pretrained_cfg["hf_hub_id"], "weights_sha256": digest}
    if ancestry.source == "file":
        take_weights(config, vit, Path(ancestry.weights))
        facts |= {"weights": ancestry.weights}
    teacher.to(context.workers.device)
    if ancestry.head == "fit":
        fit_head(context, teacher)
    facts["params"] = sum(parameter.numel() for parameter in vit.parameters())
    if teacher.classifies:
        top1, top5 = context.accuracies({"ancestry": lambda images: teacher(images)[0]})["ancestry"]
        facts |= {"top1": top1, "top5": top5}
        log.info("ancestry: top-1 %.2f %%, top-5 %.2f %%, %.2f M parameters", top1, top5, facts["params"] / 1e6)

    def fill(folder: Path) -> AncestryFacts:
        save_tensors(folder / "ancestry.safetensors", vit.state_dict())
        return facts

    context.write("ancestry", [], fill, time.monotonic() - began)


def take_weights(config: RunConfig, vit: nn.Module, weights: Path) -> None:
    """Gives the architecture the weights of a file; UserError if they do not fit."""
    state = adapted_weights(vit, load_tensors(weights), config.ancestry.head == "pretrained")
    load_weights(vit, state, str(weights))


def fit_head(context: Context, ancestry: Ancestry) -> None:
    """Gives the ancestry's classifier the weights of a logistic regression on its pooled features. Every rank does."""
    heads = ancestry.vit.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    if not all(isinstance(head, nn.Linear) for head in heads):
        raise UserError(
            f"ancestry.head is fit, but {context.config.ancestry.model} has no linear classifier: set ancestry.head to "
            "none, or to pretrained."
        )
    features, labels = [], []
    for batch in context.clean_batches(context.config.ancestry.head_images):
        features.append(ancestry.features(batch.images))
        labels.append(batch.targets)
    classes = context.config.data.num_classes
    weight, bias = fit_classifier(torch.cat(features), torch.cat(labels), classes)
    for head in heads:
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    log.info("ancestry: its head is fitted to %d images", sum(map(len, labels)))


def check(config: RunConfig) -> None:
    """Prints what the named ancestry is, what of it is used and what must be set; UserError if it cannot be used."""
    if not config.needs_ancestry:
        raise UserError("No stage of this recipe uses an ancestry: set finetune.distil_weight above 0 for a teacher.")
    vit = ancestry_vit(config)
    if config.ancestry.source == "file":
        take_weights(config, vit, Path(config.ancestry.weights))
    for line in [*describe(config, ancestry_of(config, vit)), check_images(config, "ancestry")]:
        sys.stdout.write(f"{line}\n" if line else "")


def describe(config: RunConfig, teacher: Ancestry) -> list[str]:
    """What the ancestry is, what becomes of images and tokens on the way to and from it, and what it teaches by."""
    ancestry, data, vit = config.ancestry, config.data, teacher.vit
    params = sum(parameter.numel() for parameter in vit.parameters()) / 1e6
    lines = [f"{ancestry.model} (timm's {type(vit).__name__}), {params:.2f} M parameters, from {ancestry.source}"]
    if teacher.images is not None:
        lines.append(f"images of {data.image_size} pixels become {teacher.images.describe()}")
    tokens = teacher.tokens
    if tokens is not None and config.taps_ancestry:
        lines.append(
            f"its tokens, {tokens.describe()}, become a class token and the rows' {tokens.grid} x {tokens.grid}"
        )
    blocks = "its blocks" if config.taps_ancestry else ""
    weights = "its weights, from which rows start" if config.copies_ancestry else ""
    logits = {"pretrained": "its logits", "fit": "logits of a head that this stage fits", "none": ""}[ancestry.head]
    lines.append(f"it teaches by {', '.join(filter(None, (logits, blocks, weights)))}")
    if not logits:
        lines.append("it has no head, so L_pred is left out")
        if config.finetune.distil_weight and not config.teaches_paths:
            lines.append("stage finetune learns from labels alone: finetune.feature_weight above 0 adds its last block")
    known = (getattr(vit, "pretrained_cfg", None) or {}).get("num_classes", data.num_classes)
    if ancestry.head == "pretrained" and ancestry.source == "hub" and known != data.num_classes:
        raise UserError(
            f"{ancestry.model} was trained for {known} classes, but data.num_classes is {data.num_classes}: set "
            "ancestry.head to fit, for a head fitted to the data, or to none, to learn from its blocks alone."
        )
    return lines
