"""What tyro refuses, in one sentence: the option, the value, what it may be, and the nearest."""

import re
from collections.abc import Sequence
from typing import Any

import tyro
from tyro._errors import BadValue, InstantiationFailure, InvalidChoice, MissingArgs, ParseErrorEvent, UnrecognizedArgs

from lgp_dist.config.flat import flatten
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest

KINDS = {"INT": "whole number", "FLOAT": "number", "AMOUNT": "number that may end in k, M, G or T"}
"""tyro's name of a type, as a sentence has it."""


def options_of(arguments: Any) -> dict[str, bool]:
    """Every option of a command, and whether a value follows it.

    arguments: the command's, with defaults.
    """
    hints = type(arguments).__annotations__
    found = {}
    for key, value in flatten(arguments).items():
        if tyro.conf.Positional in getattr(hints.get(key), "__metadata__", ()):
            continue
        if not isinstance(arguments, RunConfig):
            key = re.sub(r"^(recipe|budget)\.", "", key)  # these add no name of their own
        found["--" + key.replace("_", "-")] = not isinstance(value, bool)
        if isinstance(value, bool):
            found["--" + re.sub(r"(\w+)$", r"no-\1", key).replace("_", "-")] = False
    return found


def raise_sentence(event: ParseErrorEvent, prog: str, words: Sequence[str], arguments: Any) -> None:
    """UserError in place of tyro's own message; returns where it has none for an event.

    words: what tyro parses. arguments: the command's, with defaults.
    """
    tokens = event.tokens if isinstance(event, UnrecognizedArgs) else getattr(event, "unrecognized_tokens", [])
    if tokens:
        raise UserError(_unknown(tokens[0], prog, words, options_of(arguments)))
    if isinstance(event, MissingArgs):
        names = " and ".join(_name(missing.arg) for missing in event.missing_arguments)
        raise UserError(f"{prog} needs {names}: {prog} --help says what for.")
    if isinstance(event, InvalidChoice):
        *others, last = event.choices
        may_be = f"{', '.join(others)} or {last}" if others else last
        advice = nearest(event.value, event.choices, "choose one of these")
        raise UserError(f"{_name(event.argument)} is {event.value!r}, but takes {may_be}: {advice}.")
    if isinstance(event, BadValue | InstantiationFailure) and event.argument is not None:
        raise UserError(_wrong_value(event.argument, words))


def _unknown(token: str, prog: str, words: Sequence[str], takes_value: dict[str, bool]) -> str:
    """The sentence about a word that the command does not take."""
    if not token.startswith("-"):
        before = words[words.index(token) - 1] if token in words[1:] else ""
        if takes_value.get(before) is False:
            return f"{before} takes no value, but {token!r} follows it: leave {token!r} out."
        return f"{prog} does not take the word {token!r}: {prog} --help says what it takes."
    option = token.split("=")[0].replace("_", "-")
    section, _, last = option.strip("-").rpartition(".")
    alike = [name for name in takes_value if name.strip("-").split(".")[-1] == last]  # of --lr: --distil.train.lr, ...
    inside = [name for name in alike if section and name.startswith(f"--{section.split('.')[0]}.")]
    advice = f"one of {', '.join(alike)} may be meant" if alike else f"{prog} --help lists them"
    return f"{prog} has no option {option}: {nearest(option, inside or takes_value, advice)}."


def _name(argument: Any) -> str:
    """An argument as a person writes it."""
    return argument.field.extern_name.upper() if argument.is_positional() else argument.lowered.name_or_flags[0]


def _wrong_value(argument: Any, words: Sequence[str]) -> str:
    """The sentence about a value of the wrong type, or about too few values."""
    name, count = _name(argument), argument.lowered.nargs
    kind = next((text for key, text in KINDS.items() if key in argument.lowered.metavar), "value")
    wanted = f"a {kind}" if count == 1 else f"{count if isinstance(count, int) else ''} {kind}s".strip()
    default = argument.field.default
    example = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    example = "10M" if argument.lowered.metavar == "AMOUNT" else example
    advice = "write one" if default in (tyro.MISSING, None, "", ()) else f"write, for example, {example}"
    given = _given(name, words)
    return f"{name} {f'is {given!r}' if given else 'has no value'}, but takes {wanted}: {advice}."


def _given(name: str, words: Sequence[str]) -> str:
    """The words that stand for an option's value."""
    places = [place for place, word in enumerate(words) if word.split("=")[0].replace("_", "-") == name]
    if not places:
        return ""
    if "=" in words[places[-1]]:
        return words[places[-1]].split("=", 1)[1]
    after = list(words[places[-1] + 1 :])
    end = next((place for place, word in enumerate(after) if word.startswith("--")), len(after))
    return " ".join(after[:end])
