"""Reads an accelerate file. Needs no torch, so that the command line can read it first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lgp_dist.errors import UserError


def read_launch_file(path: Path) -> dict[str, Any]:
    """Returns the file's settings unchecked. Raises UserError if it cannot be read or holds no settings."""
    try:
        text = path.read_text(encoding="utf-8")
        stored = yaml.safe_load(text)
        twice = list(_duplicates(yaml.compose(text, Loader=yaml.SafeLoader)))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The launch file {path} cannot be read ({error}): name one of launch_configs/.") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(f"The launch file {path} is not valid YAML ({where}): correct it there.") from error
    if not isinstance(stored, dict):
        raise UserError(f"The launch file {path} holds no settings: write each as `name: value`.")
    if odd := [key for key in stored if not isinstance(key, str)]:
        raise UserError(f"The launch file {path} has the key {odd[0]!r}, which is no name of a setting: remove it.")
    if twice:
        raise UserError(f"{path} sets {twice[0]} twice, and only the last counts: remove one of them.")
    return stored


def _duplicates(node: yaml.Node | None, prefix: str = "") -> Iterator[str]:
    """Keys that occur twice in a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            yield f"{prefix}{key.value}"
        seen.add(key.value)
        yield from _duplicates(value, f"{prefix}{key.value}.")
