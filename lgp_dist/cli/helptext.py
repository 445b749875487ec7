"""Help: the front page, what may follow a command, and a recipe's settings by section."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

import tyro

from lgp_dist.cli.recipe import REGISTRY
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest

GENERAL = "run"
"""The section of the settings that stand in no other."""


def show(text: str) -> NoReturn:
    """Prints help, on one rank of a launch, and ends."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text)
    raise SystemExit(0)


def front_page(groups: Mapping[str, Mapping[str, str]]) -> NoReturn:
    """Prints the commands of each group with a line each."""
    width = max(len(name) for rows in groups.values() for name in rows)
    parts = [f"\n{title}\n{_table(rows, width)}" for title, rows in groups.items()]
    about = "Learngene Pool: vision models of many sizes from one pretrained model."
    show(f"usage: lgp COMMAND ...\n\n{about}\n{''.join(parts)}\nlgp COMMAND --help explains a command.\n")


def actions(prog: str, about: str, rows: Mapping[str, str]) -> NoReturn:
    """Prints the actions of a command with a line each."""
    table = _table(rows, max(map(len, rows)))
    show(f"usage: {prog} ACTION ...\n\n{about}\n\n{table}\n{prog} ACTION --help explains an action.\n")


def _table(rows: Mapping[str, str], width: int) -> str:
    return "".join(f"  {name:<{width}}  {text}\n" for name, text in rows.items())


def sections(config: Any, prefix: str = "") -> dict[str, Any]:
    """The parts of a configuration by dotted key, each before its own parts."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        parts = {f".{index}": part for index, part in enumerate(value)} if isinstance(value, tuple) else {"": value}
        for end, part in parts.items():
            if dataclasses.is_dataclass(part):
                key = f"{prefix}{item.name}{end}"
                found |= {key: part, **sections(part, f"{key}.")}
    return found


def recipes(arguments: Any, prog: str, about: str, rows: Mapping[str, str]) -> NoReturn:
    """Prints a command's own options, and the recipes with a line each."""
    _own_options(arguments, prog, f"{about}\n\nRecipes; after a recipe, --help explains its settings:\n\n", rows)


def overview(arguments: Any, config: RunConfig, prog: str, about: str) -> NoReturn:
    """Prints a command's own options, and the sections of its recipe's settings with a line each.

    arguments: the command's, with defaults; config: the recipe.
    """
    parts = {key: type(part) for key, part in sections(config).items()}
    if arguments is not config:
        parts = {GENERAL: type(config), **parts}
    rows = {key: (part.__doc__ or "").splitlines()[0] for key, part in parts.items()}
    _own_options(
        arguments, prog, f"{about}\n\nSections of settings; {prog} --help SECTION shows one, all shows all:\n\n", rows
    )


def section(config: RunConfig, topic: str, prog: str) -> NoReturn:
    """Prints the settings of a section with the recipe's values; UserError if the recipe has no such section.

    topic: the section, or one of its settings.
    """
    found, key = sections(config), topic.strip("-").replace("-", "_")
    key = key if key in found else key.rpartition(".")[0] or key
    if key == GENERAL:
        _own_options(config, prog, f"Settings of section {GENERAL}.", {})
    if key not in found:
        advice = nearest(key, found, f"{prog} --help lists them")
        raise UserError(f"{prog} has no section {topic!r} of settings: {advice}.")
    kind = Annotated[type(found[key]), tyro.conf.arg(name=key)]
    shown = dataclasses.make_dataclass("Shown", [("part", kind, dataclasses.field(default=found[key]))], frozen=True)
    tyro.cli(shown, registry=REGISTRY, prog=prog, description=f"Settings of section {key}.", args=["--help"])
    raise AssertionError("tyro ends after --help")


def _own_options(arguments: Any, prog: str, text: str, rows: Mapping[str, str]) -> NoReturn:
    """Prints a text, a table and tyro's help of the fields that are no configuration."""
    kind, values = type(arguments), vars(arguments)
    hidden = [(name, tyro.conf.Suppress[type(value)]) for name, value in values.items() if _is_hidden(name, value)]
    shown = dataclasses.make_dataclass("Shown", hidden, bases=(kind,), frozen=True, kw_only=True)
    text += _table(rows, max(map(len, rows), default=0))
    tyro.cli(shown, registry=REGISTRY, default=shown(**values), prog=prog, description=text, args=["--help"])
    raise AssertionError("tyro ends after --help")


def _is_hidden(name: str, value: Any) -> bool:
    """Whether a field is a configuration, several, or the name of one."""
    several = isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))
    return name == "recipe" or several or dataclasses.is_dataclass(value)
