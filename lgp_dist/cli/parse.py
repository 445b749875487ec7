"""Words of a command line become a command and its arguments.

The first step picks the command and the recipe by name. tyro then parses the other words against this command and this
recipe alone: a parser of all commands times all recipes takes ten seconds to build, and answers a misspelt option with
options of other commands.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from tyro._errors import on_parse_error  # private: pyproject.toml has an upper bound for tyro

from lgp_dist.cli import helptext
from lgp_dist.cli.recipe import REGISTRY, Recipe
from lgp_dist.cli.wrong_argument import options_of, raise_sentence
from lgp_dist.config.flat import changed_keys, flatten, is_within
from lgp_dist.config.own_recipe import is_own
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest
from lgp_dist.recipes import RECIPES, known_recipes, recipe_of

HELP = ("-h", "--help")
SUMMARIES = {name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in RECIPES.items()}
"""A line for each recipe."""


@dataclass(frozen=True)
class Command:
    """A command of `lgp`."""

    arguments: type
    """RunConfig, or a dataclass, which takes a recipe if it has a field `recipe` of type Recipe."""
    run: Callable[[Any], None]
    """Called with the parsed arguments."""
    summary: str = ""
    """One line; empty for the docstring of `arguments`."""
    words: tuple[str, ...] = ()
    """What stands before the recipe's name."""
    otherwise: "Command | None" = None
    """The command where the first word is not a recipe's name."""
    reads: tuple[str, ...] = ()
    """Settings and sections of the recipe that it reads; empty for all."""

    @property
    def about(self) -> str:
        """What it does, in one line."""
        return self.summary or (self.arguments.__doc__ or "").splitlines()[0]

    @property
    def takes_recipe(self) -> bool:
        """Whether one of its words names a recipe."""
        types = {item.name: item.type for item in dataclasses.fields(self.arguments)}
        return self.arguments is RunConfig or types.get("recipe") == Recipe

    def defaults(self, recipe: RunConfig) -> Any:
        """Its arguments before a word is read; tyro.MISSING where there is no default."""
        if self.arguments is RunConfig:
            return recipe
        empty = {
            item.name: tyro.MISSING
            for item in dataclasses.fields(self.arguments)
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        }
        return self.arguments(**empty | ({"recipe": recipe} if self.takes_recipe else {}))


@dataclass(frozen=True)
class Call:
    """A command with its arguments."""

    run: Callable[[Any], None]
    arguments: Any
    unread: tuple[str, ...] = ()
    """Settings that were changed and that the command does not read."""

    @property
    def debug(self) -> bool:
        """Whether errors show their traceback."""
        return any(getattr(each, "debug", False) for each in (self.arguments, self._config))

    @property
    def run_dir(self) -> str:
        """The run directory; empty if it has none."""
        return self._config.directory if self._config else str(getattr(self.arguments, "run", ""))

    @property
    def _config(self) -> RunConfig | None:
        """The configuration among its arguments, if there is one."""
        found = (self.arguments, *(getattr(self.arguments, name, None) for name in ("recipe", "config")))
        return next((each for each in found if isinstance(each, RunConfig)), None)

    def __call__(self) -> None:
        if self.unread and os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} not read by this command: {', '.join(self.unread)}\n")
        self.run(self.arguments)


def parse(words: Sequence[str], commands: Mapping[str, Command], groups: Mapping[str, Mapping[str, str]]) -> Call:
    """The command that the words name, with its arguments; UserError at the first word that cannot be.

    Prints help and raises SystemExit where the words ask for it.

    commands: by their one or two words, as in `shards build`. groups: what the front page shows.
    """
    if words and words[0] in HELP:
        helptext.front_page(groups)
    name, rest = _pick(words, [key.split()[0] for key in commands], "command", "lgp")
    actions = {key.split()[1]: command.about for key, command in commands.items() if key.startswith(f"{name} ")}
    if actions:
        if rest and rest[0] in HELP:
            about = next(text for rows in groups.values() for key, text in rows.items() if key.split()[0] == name)
            helptext.actions(f"lgp {name}", about, actions)
        action, rest = _pick(rest, actions, "action", f"lgp {name}")
        name = f"{name} {action}"
    command = commands[name]
    if command.otherwise and rest and not rest[0].startswith("-") and not is_recipe(rest[0]):
        command = command.otherwise
    return _with_recipe(command, f"lgp {name}", rest) if command.takes_recipe else _parsed(command, f"lgp {name}", rest)


def is_recipe(word: str) -> bool:
    """Whether a word names a recipe, of this package or of a person's own file."""
    return word in RECIPES or is_own(word)


def _pick(words: Sequence[str], known: Collection[str], what: str, prog: str) -> tuple[str, list[str]]:
    """The first word, which must be known, and the others."""
    if not words:
        raise UserError(f"{prog} needs a{'n' * (what == 'action')} {what}: {prog} --help lists them.")
    if words[0] not in known:
        advice = nearest(words[0], known, f"{prog} --help lists them")
        raise UserError(f"{prog} has no {what} {words[0]!r}: {advice}.")
    return words[0], list(words[1:])


def _with_recipe(command: Command, prog: str, words: list[str]) -> Call:
    """The arguments of a command on a recipe; or help, of the command or of a section of settings."""
    if set(words) & set(HELP) and not any(map(is_recipe, words)):
        usage = " ".join([prog, *command.words, "RECIPE"])
        more = f" With a run directory: {prog} RUN --help." if command.otherwise else ""
        helptext.recipes(command.defaults(RunConfig()), usage, command.about + more, SUMMARIES)
    place = _place_of_recipe(command, prog, words)
    name = words.pop(place)
    prog, recipe = f"{prog} {name}", recipe_of(name)
    asked = next((place for place, word in enumerate(words) if word in HELP), None)
    topic = "all" if asked is None else " ".join(words[asked + 1 : asked + 2])
    if not topic:
        summary = (known_recipes()[name].__doc__ or "").splitlines()[:1]
        helptext.overview(command.defaults(recipe), recipe, prog, "\n".join([command.about, *summary]))
    if topic != "all":
        helptext.section(recipe, topic, prog)
    return _parsed(command, prog, words, recipe)


def _place_of_recipe(command: Command, prog: str, words: Sequence[str]) -> int:
    """Index of the word that names the recipe, which may follow options; UserError where none does."""
    takes_value = options_of(command.defaults(RunConfig()))
    for place in range(len(command.words), len(words)):
        before = words[place - 1] if place else ""
        if takes_value.get(before, False):
            continue
        if is_recipe(words[place]):
            return place
        if not any(word.startswith("-") for word in words[: place + 1]):
            recipe_of(words[place])
    needs = " and ".join([*command.words, "a recipe"])
    raise UserError(f"{prog} needs {needs}, such as {next(iter(RECIPES))}: {prog} --help lists them.")


def _parsed(command: Command, prog: str, words: Sequence[str], recipe: RunConfig = RunConfig()) -> Call:  # noqa: B008
    """What tyro makes of the words after command and recipe."""
    defaults = command.defaults(recipe)
    with on_parse_error(lambda event: raise_sentence(event, prog, words, defaults)):
        arguments = tyro.cli(
            command.arguments,
            default=defaults,
            prog=prog,
            args=["--help"] if set(words) & set(HELP) else words,
            description=command.about,
            registry=REGISTRY,
            console_outputs=os.environ.get("RANK", "0") == "0",
        )
    return Call(command.run, arguments, _unread(command, arguments, recipe))


def _unread(command: Command, arguments: Any, recipe: RunConfig) -> tuple[str, ...]:
    """Keys of the recipe's settings that were changed and that the command does not read."""
    if not command.reads or not command.takes_recipe:
        return ()
    now = flatten(arguments.recipe)
    changed = set(changed_keys(flatten(recipe), now))
    return tuple(key for key in now if key in changed and not is_within(key, command.reads))
