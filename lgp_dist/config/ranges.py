"""The smallest and largest value of every setting, and the one place that checks types and values."""

import dataclasses
import math
import re
import reprlib
import typing
from typing import Any

import typeguard

from lgp_dist.config.budget import Amount
from lgp_dist.config.data_config import DataConfig
from lgp_dist.config.flat import flatten
from lgp_dist.errors import UserError

POSITIVE = math.ulp(0.0)
"""The smallest float above zero."""

COUNT, STEPS, WIDTH = 2**31 - 1, 2**62, 2**20
"""The largest numbers of images, optimizer steps and channels."""

TRAIN: dict[str, tuple[float, float]] = {
    "epochs": (POSITIVE, 1e9),
    "max_steps": (0, STEPS),
    "batch_size": (1, COUNT),
    "accumulate": (1, COUNT),
    "lr": (0, math.inf),
    "min_lr": (0, math.inf),
    "warmup_epochs": (0, math.inf),
    "weight_decay": (0, 1e9),
    "momentum": (0, 1),
    "eps": (POSITIVE, math.inf),
    "clip_grad": (0, 1e30),
    "ema": (0, 0.999999),
    "mixup": (0, 1e9),
    "cutmix": (0, 1e9),
    "label_smoothing": (0, 1),
    "log_every": (1, COUNT),
}
"""Of each stage's `train`."""

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, COUNT),
    "data.image_size": (1, 65536),
    "data.num_classes": (1, COUNT),
    "data.crop_pct": (POSITIVE, 1),
    "data.augment.hflip": (0, 1),
    "data.augment.random_erase": (0, 1),
    "data.augment.color_jitter": (0, math.inf),
    "data.window": (1, COUNT),
    "data.max_bad": (0, COUNT),
    "data.threads": (0, 1024),
    "data.cache_bytes": (1, 2**62),
    "data.timeout_s": (0.1, 86400),
    "data.retries": (0, 1000),
    "engine.threads": (0, 4096),
    "engine.audit_weights_every": (0, STEPS),
    "engine.fp16_scale": (1, 2**40),
    "faults.skip_steps": (0, COUNT),
    "faults.spike": (0, 1e9),
    "faults.rollback": (0, COUNT),
    "faults.timeout_s": (1, COUNT),
    "model.patch_size": (1, 65536),
    "model.depth": (2, 4096),
    "model.rows.width": (1, WIDTH),
    "model.rows.heads": (1, WIDTH),
    "model.rows.depth": (0, 4096),
    "model.stitch_rank": (0, WIDTH),
    "model.rows.drop_path": (0, 0.999),
    "ancestry.width": (1, WIDTH),
    "ancestry.depth": (1, 4096),
    "ancestry.heads": (1, WIDTH),
    "ancestry.image_size": (0, 65536),
    "ancestry.head_images": (1, COUNT),
    "ancestry.drop_path": (0, 0.999),
    "distil.alpha": (0, 1),
    "distil.tau": (POSITIVE, math.inf),
    "distil.inverse_weight": (0, 1e9),
    "pool.samples": (1, COUNT),
    "pool.ridge": (POSITIVE, 1e9),
    "specialise.top": (0, COUNT),
    "specialise.epochs": (0, 1e9),
    "specialise.lr": (0, math.inf),
    "finetune.tau": (POSITIVE, math.inf),
    "finetune.distil_weight": (0, 1e9),
    "finetune.label_weight": (0, 1e9),
    "finetune.feature_weight": (0, 1e9),
    "finetune.lead_weight": (0, 1e9),
    "finetune.paths_per_batch": (1, COUNT),
    "finetune.watch_every": (0, STEPS),
    "finetune.watch_images": (1, COUNT),
    "finetune.row_weight": (1e-3, 1e3),
    "finetune.bin_flops": (0, math.inf),
    "evaluate.batch_size": (1, COUNT),
    "checkpoint.every": (0, STEPS),
    "checkpoint.keep": (1, 10_000),
    "budget.max_params": (0, math.inf),
    "budget.max_flops": (0, math.inf),
    "budget.max_latency_ms": (0, math.inf),
    "budget.batch": (1, WIDTH),
    "export.images": (1, COUNT),
    "export.int8_images": (1, COUNT),
    **{
        f"{part}.{name}": limits
        for part in ("ancestry.train", "distil.train", "finetune.train", "config")
        for name, limits in TRAIN.items()
    },
}
"""By dotted key, without a row's number; config: what lgp_dist.api.train takes."""


def check_value(key: str, value: Any) -> None:
    """UserError if a setting has a range and the value is outside it."""
    key_of_all_rows = re.sub(r"\.\d+\.", ".", key)
    if key_of_all_rows not in RANGES:
        return
    low, high = RANGES[key_of_all_rows]
    if not low <= value <= high or value == math.inf:
        if high == math.inf:
            allowed = "above 0" if low == POSITIVE else f"{low:.12g} or more"
        else:
            allowed = f"above 0 and at most {high:.12g}" if low == POSITIVE else f"from {low:.12g} to {high:.12g}"
        allowed += " and finite" * (value == high)
        raise UserError(f"{key} is {value}, but must be {allowed}: choose another value.")


def check_types(settings: Any, prefix: str = "") -> None:
    """UserError at the first setting of a dataclass tree that has another type than its field. prefix: of its keys."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        key, value = prefix + name, getattr(settings, name)
        kind = float if kind is Amount else kind
        try:
            typeguard.check_type(value, kind, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
            if isinstance(value, bool) and kind is not bool:
                raise typeguard.TypeCheckError("a bool is an int to Python")
        except typeguard.TypeCheckError:
            known = kind.__name__ if isinstance(kind, type) else re.sub(r"\w+\.", "", str(kind))
            raise UserError(f"{key} is {reprlib.repr(value)}, but must be of type {known}: correct it.") from None
        parts = {f"{key}.{index}.": part for index, part in enumerate(value)} if isinstance(value, tuple) else {}
        for place, part in {f"{key}.": value, **parts}.items():
            if dataclasses.is_dataclass(part):
                check_types(part, place)


def check_ranges(settings: Any, prefix: str = "") -> None:
    """UserError at the first setting of a dataclass tree of another type or out of range. prefix: as above."""
    check_types(settings, prefix)
    for key, value in flatten(settings, prefix=prefix).items():
        check_value(key, value)


def check_data(data: DataConfig) -> None:
    """UserError where settings of the data are out of range or would give wrong pixels."""
    check_ranges(data, "data.")
    if data.channels not in (1, 3):
        raise UserError(f"data.channels is {data.channels}, but images have 1 (grey) or 3 (RGB): choose one of them.")
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != data.channels:
            raise UserError(
                f"data.{key} has {len(values)} values, but data.channels is {data.channels}: give one for each channel."
            )
    if min(data.std) <= 0:
        raise UserError(f"data.std is {data.std}, but a standard deviation is above 0: change it.")
    low, high = data.augment.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"data.augment.crop_scale is ({low}, {high}), but shares have 0 < low <= high <= 1: change it.")
