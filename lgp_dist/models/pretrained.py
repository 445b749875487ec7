"""Whether a run gives pretrained weights the images that they were trained on."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from lgp_dist.config.flat import flatten
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError

Images = dict[str, Any]
"""What a model sees in evaluation, by name of a setting; None for what is not known."""
NAMES = ("mean", "std", "channels", "image_size", "interpolation", "crop_pct")
ADAPTED = ("mean", "std", "image_size")
"""Of these, settings that the ancestry also has, to which its images are adapted."""


def check_images(config: RunConfig, key: str) -> str:
    """Compares the images that the weights of `ancestry` or `model.rows.N` expect with those that the run gives them.

    Returns a sentence on what differs, empty if nothing does. UserError if it is the mean or std of weights that are
    known, unless a setting of the ancestry asks for it. Rows of other channels than the images' fail to load later.
    """
    one, settings = config.ancestry if key == "ancestry" else config.model.rows[int(key[11:])], flatten(config)
    if one.source not in ("hub", "file"):
        return ""
    keys = {name: f"ancestry.{name}" if key == "ancestry" and name in ADAPTED else f"data.{name}" for name in NAMES}
    beside = _beside(Path(one.weights)) if one.source == "file" else {}
    given = _given(settings, key == "ancestry")
    wrong = {
        name: value
        for name, value in (beside or _of_timm(one.model)).items()
        if None not in (value, given[name]) and _words(value) != _words(given[name])
    }
    if not wrong:
        return ""
    weights = f"Weights in {one.weights}" if beside else f"timm's weights of {one.model}"
    condition = "" if beside or one.source == "hub" else f"if those in {one.weights} do too, "
    expected = ", ".join(f"{keys[name]} {_words(value)}" for name, value in wrong.items())
    advice = " ".join(f"--{keys[name].replace('_', '-')} {_words(value)}" for name, value in wrong.items())
    values = ", ".join(_words(given[name]) for name in wrong)
    sentence = f"{weights} ({key}) expect {expected}, but get {values}: {condition}set {advice}."
    if (
        not condition
        and "channels" not in wrong
        and any(name in wrong and not settings.get(f"{key}.{name}") for name in ("mean", "std"))
    ):
        raise UserError(sentence)
    return sentence


def ancestry_images(config: RunConfig) -> Images:
    """The images that a run gives its ancestry."""
    return _given(flatten(config), True)


def _given(settings: Mapping[str, Any], ancestry: bool) -> Images:
    """The images that a run with these flat settings gives its rows, or its ancestry, which are adapted."""
    found = {name: settings.get(f"data.{name}") for name in NAMES}
    if ancestry:
        stock = {} if settings["ancestry.source"] == "train" else _of_timm(settings["ancestry.model"])
        stock |= {"image_size": None}
        found |= {name: settings.get(f"ancestry.{name}") or stock.get(name) or found[name] for name in ADAPTED}
        found["channels"] = None
    return found


def _of_timm(model: str) -> Images:
    """By timm's description of a pretrained model; empty without one. UserError if there are no such weights."""
    try:
        described = timm.get_pretrained_cfg(model) if model not in ("", "vit") else None
    except RuntimeError as error:
        raise UserError(f"timm does not have {model} ({str(error).rstrip('.')}): choose another model.") from None
    return _described(described.to_dict()) if described else {}


def _beside(weights: Path) -> Images:
    """By the record of the stage that wrote the weights, or by timm's config.json next to them; empty without these."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("artifact.json", "config.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found |= json.loads((weights.parent / name).read_text())
    if weights.name in found.get("files", {}):
        return _given(found["config"], found["stage"] == "ancestry")
    return _described(found["pretrained_cfg"]) if "pretrained_cfg" in found else {}


def _described(pretrained: Mapping[str, Any]) -> Images:
    channels, size, *_ = pretrained.get("input_size") or (None, None)
    known = {**pretrained, "channels": channels, "image_size": size}
    return {name: known.get(name) for name in NAMES}


def _words(value: Any) -> str:
    """A value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
