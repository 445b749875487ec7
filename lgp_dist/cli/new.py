"""`lgp new FILE` and `lgp show RECIPE`: a recipe of one's own to start from, and what a recipe says."""

import ast
import inspect
import json
import keyword
import sys
import textwrap
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from lgp_dist.cli.recipe import Recipe
from lgp_dist.config.flat import differences, flatten, is_within, shown
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest
from lgp_dist.files import write_atomic
from lgp_dist.recipes import RECIPES, recipe_of
from lgp_dist.run.text_table import text_table

WRITTEN = (
    *("data.root", "data.train_split", "data.val_split", "data.image_size", "data.channels", "data.num_classes"),
    *("data.mean", "data.std", "model.patch_size", "model.depth", "model.rows", "engine.precision", "engine.device"),
    *("ancestry.model", "ancestry.source", "ancestry.weights", "ancestry.head"),
    *("distil.train.epochs", "distil.train.batch_size", "distil.train.lr"),
    *("finetune.train.epochs", "finetune.train.batch_size", "finetune.train.lr", "finetune.row_lr"),
    *("budget.max_params", "seed"),
)
"""Settings and sections that a new recipe has, each with its explanation."""
TAKEN = {"recipes", "replace", "RowConfig", "RunConfig"}
"""Names that the file imports, which its function would hide."""


@dataclass(frozen=True)
class New:
    """Write a commented recipe to start from; run it as FILE.py:NAME."""

    file: Annotated[Path, tyro.conf.Positional]
    """Python file to write, such as flowers.py; must not exist."""
    start: Annotated[str, tyro.conf.arg(name="from")] = "tiny"
    """Recipe that it changes."""
    data: str = ""
    """Shards that it reads: their classes and splits are filled in. Empty for the recipe's."""


@dataclass(frozen=True)
class Show:
    """Print a recipe's settings, or what differs from another recipe."""

    recipe: Recipe
    diff: str = ""
    """Another recipe: print only what differs from it."""
    json: bool = False
    """Print an object of settings by dotted key."""


def new_recipe(action: New) -> None:
    """Writes the file."""
    file, name = action.file, action.file.stem
    quoted = any(character in str(file) for character in '"\\\n')
    if file.suffix != ".py" or quoted or not name.isidentifier() or keyword.iskeyword(name) or name in TAKEN:
        raise UserError(f"{file} names no recipe: choose a file such as flowers.py, whose recipe is flowers.")
    if file.exists():
        raise UserError(f"{file} is there already: choose another file, or remove it.")
    if action.start not in RECIPES:
        advice = nearest(action.start, RECIPES, f"take {', '.join(RECIPES)}")
        raise UserError(f"--from names {action.start!r}, which is no recipe of this package: {advice}.")
    base = RECIPES[action.start]()
    config = _on_shards(base, action.data) if action.data else base
    write_atomic(file, _text(action.start, name, str(file), config).encode())
    sys.stdout.write(f"{file}: change it, then lgp run {file}:{name}\n")


def show_recipe(action: Show) -> None:
    """Prints a line for each setting."""
    now = flatten(action.recipe)
    values = {key: shown(value) for key, value in now.items()}
    if action.diff:
        values = differences(now, flatten(recipe_of(action.diff)), action.diff)
    if action.json:
        sys.stdout.write(json.dumps({key: now.get(key) for key in values}, indent=2) + "\n")
    elif values:
        sys.stdout.write(text_table(["setting", "value"], [*values.items()], left=2) + "\n")
    else:
        sys.stdout.write(f"Nothing differs from {action.diff}.\n")


def _on_shards(config: RunConfig, root: str) -> RunConfig:
    """The recipe on other shards; an ancestry for other classes gets a new head, or is trained."""
    from lgp_dist.data.remote.roots import load_manifest  # NumPy and Pillow

    data = replace(config.data, root=root)
    manifest = load_manifest(data)
    train = "train" if "train" in manifest.splits else next(iter(manifest.splits), "train")
    others = [split for split in manifest.splits if split != train]
    if not manifest.classes or not others:
        missing = "second split, for evaluation" if manifest.classes else "names of classes"
        raise UserError(f"The manifest of {root} has no {missing}: build the shards again, or leave out --data.")
    data = replace(data, num_classes=len(manifest.classes), train_split=train, val_split=others[0])
    ancestry = config.ancestry
    if data.num_classes != config.data.num_classes:
        ancestry = replace(ancestry, **{"head": "fit"} if ancestry.source == "hub" else {"source": "train"})
    return replace(config, data=data, ancestry=ancestry)


def _text(start: str, name: str, file: str, config: RunConfig) -> str:
    """The file's text: a function that returns the configuration, made from recipe `start`."""
    summary = f"{name}: recipe {start} with settings of one's own."
    body = "\n".join(_changed("base", config, "", " " * 8))
    return f'''"""{summary}

    lgp run {file}:{name}
    lgp show {file}:{name} --diff {start}

The first command runs it: options override what stands here, and --help explains all settings. The second prints what
differs from {start}.
"""

from dataclasses import replace

from lgp_dist import recipes
from lgp_dist.config.run_config import RowConfig, RunConfig


def {name}() -> RunConfig:
    """{summary}"""
    base = recipes.{start}()
    return replace(
        base,
{body}
    )
'''


def _changed(base: str, config: Any, prefix: str, indent: str) -> list[str]:
    """Keywords of `replace`, each after its explanation. base: the expression whose fields they are."""
    lines, docs = [], _field_docs(type(config))
    for item in fields(config):
        key, value = prefix + item.name, getattr(config, item.name)
        if is_dataclass(value) and any(is_within(written, [key]) for written in WRITTEN):
            inner = f"{base}.{item.name}"
            lines += [f"{indent}{item.name}=replace(", f"{indent}    {inner},"]
            lines += [*_changed(inner, value, f"{key}.", f"{indent}    "), f"{indent}),"]
        elif key in WRITTEN:
            lines += textwrap.wrap(docs[item.name], 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            several = isinstance(value, tuple) and any(map(is_dataclass, value))
            inside = [f"{indent}    {_code(each)}," for each in value] if several else []
            code = "\n".join(["(", *inside, f"{indent})"]) if several else _code(value)
            lines.append(f"{indent}{item.name}={code},")
    return lines


def _code(value: Any) -> str:
    """An expression for a value; of a dataclass, with what is not its default."""
    if is_dataclass(value):
        given = [each for each in fields(value) if getattr(value, each.name) != each.default]
        inside = ", ".join(f"{each.name}={_code(getattr(value, each.name))}" for each in given)
        return f"{type(value).__name__}({inside})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_code, value))}{',' * (len(value) == 1)})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _field_docs(kind: type) -> dict[str, str]:
    """The explanation of each field, which stands below it in the source."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for item, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
            found[item.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found
