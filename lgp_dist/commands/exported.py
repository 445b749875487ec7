"""An exported descendant as the start of a run on another data set. Needs no torch: the command line reads it first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lgp_dist.config.run_config import DataConfig, ModelConfig, RunConfig
from lgp_dist.data.remote.roots import load_manifest
from lgp_dist.errors import UserError


def completed(folder: Path, config: RunConfig) -> RunConfig:
    """The settings with input, normalisation and shape of an exported folder, and its weights as what they begin with.

    UserError where the folder or the shards do not say what is needed, or the new folder is there already.
    """
    described, done = read_config(folder), Path(config.directory) / "export"
    if done.exists():
        raise UserError(f"{done} is there already: choose another --out, or remove it.")
    data = data_of(described, config.data)
    classes = data.num_classes or len(load_manifest(data).classes)
    if not classes:
        raise UserError(f"The manifest of {data.root} names no classes: say how many there are with --num-classes.")
    return replace(
        config,
        data=replace(data, num_classes=classes),
        model=ModelConfig(patch_size=described["lgp"]["shape"]["patch_size"]),
        finetune=replace(config.finetune, weights=str(folder / "model.safetensors")),
    )


def data_of(described: dict[str, Any], data: DataConfig) -> DataConfig:
    """Settings of data with the size and normalisation of images that a folder's config.json describes."""
    shape, trained = described["lgp"]["shape"], described["pretrained_cfg"]
    return replace(
        data,
        image_size=shape["image_size"],
        channels=shape["channels"],
        mean=tuple(trained["mean"]),
        std=tuple(trained["std"]),
        interpolation=trained["interpolation"],
        crop_pct=trained["crop_pct"],
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported descendant; UserError where the folder has none."""
    path = folder / "config.json"
    if (folder / "export" / "config.json").is_file():
        raise UserError(f"{folder} is a run: name {folder / 'export'}, or another folder that `lgp export` wrote.")
    if (folder / "paths.json").is_file():
        raise UserError(f"{folder} holds all paths of a pool: write one with `lgp export RUN --path KEY --out FOLDER`.")
    try:
        described = json.loads(path.read_text())
        described["lgp"]["shape"], described["lgp"]["measured"], described["pretrained_cfg"]["mean"]  # noqa: B018
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not describe an exported descendant ({error}): name a folder that `lgp export` wrote."
        ) from None
    return described
