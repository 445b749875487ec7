"""Recipes in people's own files: FILE.py:FUNCTION and PACKAGE.MODULE:FUNCTION.

Naming one imports Python code. So only what a person writes on a command line may come here, never what a run's files
say.
"""

import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lgp_dist.config.ranges import check_types
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest

_OWN = re.compile(r"(?P<place>.+\.py|[A-Za-z_][\w.]*):(?P<function>\w*)|(?P<file>.+\.py)")

LIBRARIES = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
"""Folders of code that is not the recipe's."""


def is_own(name: str) -> bool:
    """Whether a word names a recipe of a person's own, rather than one of this package."""
    return _OWN.fullmatch(name) is not None


class OwnRecipe:
    """A function of a person's own file; called, it returns the configuration as it was when the file was imported."""

    def __init__(self, name: str):
        """Imports the file and calls the function; UserError where it is missing or returns no RunConfig."""
        found = _OWN.fullmatch(name)
        assert found is not None
        place = found["place"] or found["file"]
        self.source, module = _read_file(Path(place)) if place.endswith(".py") else _import_module(place)
        function = _function(module, place, found["function"] or "")
        needed = [each.name for each in inspect.signature(function).parameters.values() if each.default is each.empty]
        if needed:
            raise UserError(f"{name} takes {needed[0]!r}, but a recipe is called without arguments: remove it.")
        config = _guarded(name, function)
        if not isinstance(config, RunConfig):
            kind = type(config).__name__
            raise UserError(f"{name} returns {kind}, not a RunConfig: return one, such as lgp_dist.recipes.tiny().")
        try:
            check_types(config)
        except UserError as error:
            raise UserError(f"In what {name} returns, {error}") from None
        self._config, self.__doc__ = replace(config, recipe=name), function.__doc__

    def __call__(self) -> RunConfig:
        return self._config


OWN: dict[str, OwnRecipe] = {}
"""The recipes that this command line has named."""


def _read_file(path: Path) -> tuple[str, ModuleType]:
    """Text and module of a file, which finds its neighbours as a script does."""
    try:
        source = path.read_text()
    except (OSError, ValueError) as error:
        advice = f"`lgp new {path} --from tiny` makes one" if not path.exists() else "name one that can be read"
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', error)}): {advice}.") from None
    module = ModuleType(f"recipes_of_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look for it
    _guarded(str(path), lambda: exec(compile(source, path, "exec"), module.__dict__), path.resolve().parent)
    return source, module


def _import_module(name: str) -> tuple[str, ModuleType]:
    """Text and module of a module that Python finds in the current folder or among what is installed."""

    def load() -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            return None

    importlib.invalidate_caches()
    module = _guarded(name, load, Path.cwd())
    if module is None:
        raise UserError(f"There is no module {name}: name one of this folder or of an installed package, or FILE.py.")
    source = Path(module.__file__).read_text() if module.__file__ else ""
    return source, module


def _function(module: ModuleType, place: str, name: str) -> Callable[[], Any]:
    """A function of a module; UserError where it has none of that name."""
    if name and callable(function := getattr(module, name, None)):
        return function
    functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
    own = [key for key in functions if functions[key].__module__ == module.__name__ and not key.startswith("_")]
    if name:
        raise UserError(f"{place} has no function {name!r}: {nearest(name, own, 'name one that returns a RunConfig')}.")
    example = own[0] if own else "FUNCTION"
    raise UserError(f"{place} does not say which function is the recipe: write {place}:{example}.")


def _guarded(name: str, call: Callable[[], Any], folder: Path | None = None) -> Any:
    """What the call returns; what a person's code raises becomes a sentence. folder: where it imports from first."""
    before = list(sys.path)
    sys.path[:0] = [str(folder)] if folder else []
    try:
        return call()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if not frame.filename.startswith(LIBRARIES)), frames[-1])
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
        said = str(error.msg if isinstance(error, SyntaxError) else error).rstrip(".").replace("\n", " ")
        where = f"line {line} of {file}" + f" ({said})" * bool(said)
        raise UserError(f"{name} raises {type(error).__name__} in {where}: correct the recipe.") from error
    finally:
        sys.path[:] = before


def source_of(name: str) -> str:
    """The text of the file of a recipe; empty for one of this package, and for one that only a run's files name."""
    return OWN[name].source if name in OWN else ""
