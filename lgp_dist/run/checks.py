"""Settings that would train wrongly or fail late, refused before anything starts."""

import contextlib
import json
import re
from typing import Any

from lgp_dist.config.data_config import DataConfig
from lgp_dist.config.flat import STAGES, flatten
from lgp_dist.config.ranges import check_data, check_ranges
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest
from lgp_dist.paths.path import Space
from lgp_dist.paths.space import space_of

SOURCES = ("ancestry.weights", "finetune.weights", "finetune.start_weights", "finetune.costs")
"""Settings that name a file, whose content counts and not its name; rows have such a setting each."""


def check_config(config: RunConfig) -> None:
    """UserError at the first setting that is out of range or does not fit another."""
    check_ranges(config)
    check_data(config.data)
    _check_shapes(config)
    tracker_options(config)


def tracker_options(config: RunConfig) -> dict[str, dict[str, Any]]:
    """By tracker, the arguments that `tracker_args` gives it: JSON, or else text. UserError where that is malformed."""
    found: dict[str, dict[str, Any]] = {name: {} for name in config.trackers}
    for word in config.tracker_args:
        key, equals, text = word.partition("=")
        tracker, _, option = key.partition(".")
        if not equals or not option:
            raise UserError(f"tracker_args has {word!r}: write TRACKER.KEY=VALUE, such as wandb.entity=team.")
        if tracker not in found:
            raise UserError(f"tracker_args sets {key}, but trackers are {' '.join(found) or 'none'}: add {tracker}.")
        found[tracker][option] = text
        with contextlib.suppress(ValueError):
            found[tracker][option] = json.loads(text)
    return found


def check_classes(data: DataConfig, known: int) -> None:
    """UserError if the data has more classes than the model. known: those that a manifest names; 0 for none."""
    if data.num_classes < known:
        raise UserError(
            f"data.num_classes is {data.num_classes}, but the manifest of {data.root} names {known} classes: set it to "
            f"{known}."
        )


def check_model(config: RunConfig) -> None:
    """UserError at the first setting of the model that is out of range or does not fit another."""
    check_ranges(config.model, "model.")
    space_of(config)
    widths = {f"model.rows.{index}": (row.width, row.heads) for index, row in enumerate(config.model.rows)}
    if config.ancestry.model == "vit":
        widths["ancestry"] = (config.ancestry.width, config.ancestry.heads)
    for key, (width, heads) in widths.items():
        if width % heads:
            raise UserError(
                f"{key} has width {width} and {heads} heads, but heads must divide the width: change one of them."
            )
    _check_rows(config)


def _check_shapes(config: RunConfig) -> None:
    check_model(config)
    space = space_of(config)
    if 0 < config.faults.spike <= 1:
        raise UserError(
            f"faults.spike is {config.faults.spike}, which a usual loss exceeds: set it above 1, or to 0 for no guard."
        )
    _check_ancestry(config)
    paths, micro_steps = config.finetune.paths_per_batch, config.finetune.train.accumulate
    if micro_steps % paths:
        raise UserError(
            f"finetune.paths_per_batch is {paths}, which does not divide finetune.train.accumulate {micro_steps}: set "
            f"accumulate to {-(-micro_steps // paths) * paths}, or change paths_per_batch."
        )
    _check_keys("finetune.only", config.finetune.only, space)
    _check_keys("specialise.paths", config.specialise.paths, space)
    _check_teachers(config, space)
    if config.export.path:
        chosen = space.by_key(config.export.path)
        if chosen not in space.chosen(config.finetune.only):
            raise UserError(
                f"export.path is {chosen.key!r}, but finetune.only names other paths, which alone are trained and "
                "measured: choose one of these, or add it."
            )
    if not config.specialise.top and not config.specialise.paths and (config.specialise.epochs or config.specialise.lr):
        raise UserError(
            "specialise.epochs and specialise.lr are for paths that are trained alone, but none is asked for: set "
            "specialise.top or specialise.paths, or leave them out."
        )
    if not config.finetune.distil_weight + config.finetune.label_weight:
        raise UserError("finetune.distil_weight and finetune.label_weight are both 0: raise one.")
    _check_depths(config, space)
    _check_nested(config)
    _check_row_lr(config.finetune.row_lr, len(space.widths))
    _check_allowed(config)


def _check_ancestry(config: RunConfig) -> None:
    """UserError where the ancestry cannot be made, would be shown wrong images, or has nothing to teach."""
    ancestry, data = config.ancestry, config.data
    if config.needs_ancestry and ancestry.source == "file" and not ancestry.weights:
        raise UserError("ancestry.source is file, but ancestry.weights is empty: name a safetensors file.")
    if ancestry.source == "hub" and ancestry.model == "vit":
        raise UserError("ancestry.source is hub, but ancestry.model is vit: name a model of timm, or another source.")
    if ancestry.source == "train" and (ancestry.head != "pretrained" or ancestry.mean or ancestry.std):
        raise UserError(
            "ancestry.source is train, so the run trains the head, on images of data.mean and data.std: leave "
            "ancestry.head pretrained, and ancestry.mean and ancestry.std empty."
        )
    for key, values in (("mean", ancestry.mean), ("std", ancestry.std)):
        if len(values) not in (0, 3, data.channels) or (key == "std" and min(values, default=1.0) <= 0):
            raise UserError(
                f"ancestry.{key} is {values}: give a value for each channel, a std above 0, or leave it empty."
            )
    if ancestry.model == "vit" and ancestry.image_size % config.model.patch_size:
        raise UserError(
            f"ancestry.image_size is {ancestry.image_size}, but model.patch_size {config.model.patch_size} does not "
            "divide it: change one of them."
        )
    if ancestry.head != "none":
        return
    for index, row in enumerate(config.model.rows):
        if row.source == "distil" and row.levels == "none":
            raise UserError(
                f"ancestry.head is none, but model.rows.{index} has no levels, so the ancestry has nothing to teach "
                f"it: set model.rows.{index}.levels to last or dense, or its source to labels."
            )
    if not config.finetune.label_weight:
        raise UserError("ancestry.head is none and finetune.label_weight is 0, so nothing trains the logits: raise it.")


def _check_rows(config: RunConfig) -> None:
    model, kind = config.model, "stages" if config.model.stages else "widths"
    of_pools = {"two_way": model.two_way, "stitch_rank": model.stitch_rank}
    of_pools |= {f"rows.{index}.depth": row.depth for index, row in enumerate(model.rows)}
    for name, value in of_pools.items():
        if value and (model.stages or model.widths):
            raise UserError(f"model.{name} is for pools of stitched rows, but model.{kind} is set: leave it out.")
    narrowest = min(row.width for row in model.rows)
    if model.stitch_rank >= narrowest:
        raise UserError(
            f"model.stitch_rank is {model.stitch_rank}, but must be below the narrowest row's width {narrowest}, or it "
            "saves nothing: lower it, or set it to 0."
        )
    for index, row in enumerate(config.model.rows):
        key = f"model.rows.{index}"
        if row.source == "hub" and not row.model:
            raise UserError(f"{key}.source is hub, but {key}.model is empty: name a plain ViT of timm.")
        if row.source == "file" and not row.weights:
            raise UserError(f"{key}.source is file, but {key}.weights is empty: name a safetensors file.")
        if row.source != "distil" and row.levels != "none":
            raise UserError(
                f"{key}.levels is {row.levels}, but a row of source {row.source} is not distilled: set levels to none, "
                "or source to distil."
            )
        ancestry = config.ancestry
        shape, theirs = (row.width, row.heads), (ancestry.width, ancestry.heads)
        if row.source == "tail" and ancestry.model == "vit" and shape != theirs:
            raise UserError(
                f"{key}.source is tail, but the row has width {row.width} and {row.heads} heads and the ancestry "
                f"{ancestry.width} and {ancestry.heads}: give the row the ancestry's."
            )
        if row.start == "ancestry" and row.source not in ("distil", "labels"):
            raise UserError(
                f"{key}.start is ancestry, but source {row.source} brings its own weights or none: set start to "
                "random, or source to distil or labels."
            )
        if config.model.two_way and config.pool.stitch_init.startswith("transformation"):
            raise UserError(
                f"pool.stitch_init is {config.pool.stitch_init}, but model.two_way also joins the wide row to the "
                "narrow one, for which distillation learns no map: choose --pool.stitch-init least_squares."
            )
        is_narrow, init = index + 1 < len(config.model.rows), config.pool.stitch_init
        if is_narrow and init.startswith("transformation") and row.source != "distil":
            raise UserError(
                f"pool.stitch_init is {init}, but row {index} is of source {row.source} and learns no transformation: "
                "choose --pool.stitch-init least_squares."
            )


def _check_teachers(config: RunConfig, space: Space) -> None:
    """UserError where a path would have no teacher, or the lead path none to teach."""
    finetune = config.finetune
    if finetune.feature_weight and not finetune.distil_weight and not finetune.lead_weight:
        raise UserError(
            f"finetune.feature_weight is {finetune.feature_weight}, but neither the ancestry nor a lead path teaches: "
            "raise finetune.distil_weight or finetune.lead_weight, or set it to 0."
        )
    if not finetune.lead_weight:
        return
    lead = [path for path in space.paths if path.is_row][-1]
    if finetune.paths_per_batch < 2:
        raise UserError(
            "finetune.lead_weight is above 0, but finetune.paths_per_batch is 1, so that no path takes the lead path's "
            "images: set finetune.paths_per_batch and finetune.train.accumulate to 2 or more."
        )
    if lead not in space.chosen(finetune.only) or len(finetune.only or space.paths) < 2:
        raise UserError(
            f"finetune.lead_weight is above 0, but finetune.only does not name {lead.key!r}, which leads, and another "
            "path: add them, or set finetune.lead_weight to 0."
        )


def _check_keys(setting: str, keys: tuple[str, ...], space: Space) -> None:
    known = {path.key for path in space.paths}
    for key in keys:
        if key not in known:
            advice = nearest(key, known, f"the first is {space.paths[0].key}")
            raise UserError(f"{setting} names {key!r}, which the pool does not have: {advice}; `lgp paths` lists them.")
        if keys.count(key) > 1:
            raise UserError(f"{setting} names {key!r} {keys.count(key)} times: name each path once.")


def _check_depths(config: RunConfig, space: Space) -> None:
    finetune = config.finetune
    count, passes = len(finetune.only or space.paths), (finetune.paths_per_batch, finetune.train.accumulate)
    if config.model.stages and finetune.sandwich and set(passes) != {count}:
        raise UserError(
            f"finetune.paths_per_batch is {passes[0]} and finetune.train.accumulate {passes[1]}, but with "
            f"finetune.sandwich each of {count} depths trains once on every batch: set both to {count}."
        )


def _check_nested(config: RunConfig) -> None:
    """UserError where nested widths would not train, or another pool in turn."""
    finetune, widths = config.finetune, config.model.widths
    count, train = len(finetune.only or widths), finetune.train
    if widths and finetune.bin_flops:
        raise UserError("finetune.bin_flops is for random draws, but model.widths trains in turn: set it to 0.")
    if not widths and finetune.policy == "in_turn":
        raise UserError("finetune.policy is in_turn, which is for model.widths: choose independent or balanced.")
    if not widths:
        return
    if count > 1 and (finetune.policy, finetune.paths_per_batch, train.accumulate) != ("in_turn", count, count):
        raise UserError(
            f"model.widths trains {count} models in turn on the same images: set finetune.policy to in_turn, and "
            f"finetune.paths_per_batch and finetune.train.accumulate to {count}."
        )
    for key, value in {"engine.compile": config.engine.compile, "finetune.row_lr": finetune.row_lr}.items():
        if value:
            raise UserError(f"{key} is {value}, which model.widths cannot use: leave it empty.")
    if config.engine.ops not in ("auto", "reference"):
        raise UserError(f"engine.ops is {config.engine.ops}, but model.widths has no fused operations: set reference.")


def _check_row_lr(factors: tuple[float, ...], rows: int) -> None:
    if factors and (len(factors) != rows or not all(0 <= factor <= 1e3 for factor in factors)):
        raise UserError(
            f"finetune.row_lr is {' '.join(map(str, factors))}, but must be {rows} factors from 0 to 1000, one for "
            "each row: change it, or leave it empty."
        )


def _check_allowed(config: RunConfig) -> None:
    """Keys of --allow-change: settings, names of sources, and the ids of artifacts that a stage was made from."""
    splits = {f"data.{split}" for split in (config.data.train_split, config.data.val_split)}
    known = {*flatten(config), *splits, *SOURCES, *(f"{stage}.id" for stage in STAGES)}
    renamed = {"data.train_split", "data.val_split"} & set(config.allow_change)
    for key in config.allow_change:
        same = re.sub(r"^model\.rows\.\d+\.", "model.rows.0.", key)  # the checkpoint may have more rows
        if same not in known and not (renamed and key.startswith("data.")):  # and its splits other names
            advice = nearest(key, sorted(known), "config.json of the run directory lists them")
            raise UserError(f"allow_change names {key!r}, which is no setting: {advice}.")
