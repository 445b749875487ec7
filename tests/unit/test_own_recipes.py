"""Recipes in people's own files: how they are found, what is said of wrong ones, and the file to start from."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from run_helpers import Lgp, call_main, has

from lgp_dist.config import own_recipe
from lgp_dist.config.flat import flatten
from lgp_dist.recipes import RECIPES, pool12, recipe_of, tiny
from lgp_dist.stages.start import differences
from lgp_dist.study.settings import arguments

OWN = """
import os
from dataclasses import dataclass, replace
from neighbour import SEED
from lgp_dist.recipes import tiny

@dataclass
class Size:
    depth: "int"

def mine():
    '''Tiny with another seed.

    More about it.
    '''
    return replace(tiny(), seed=SEED + Size(2).depth)

def number(): return 7
def broken(): return {}["key"]
def needs(more): return tiny()
def leaves(): raise SystemExit(0)
def misspelt(): return replace(tiny(), sead=1)
def text(): return replace(tiny(), data=replace(tiny().data, image_size="big"))
def flag(): return replace(tiny(), seed=True)
def word(): return replace(tiny(), finetune=replace(tiny().finetune, policy="spred"))
def row(): return replace(tiny(), model=replace(tiny().model, rows=(replace(tiny().model.rows[0], width=9.5),)))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty current folder with `own.py`, its neighbour and a package; no own recipe is known before or after."""
    monkeypatch.chdir(tmp_path)
    own_recipe.OWN.clear()
    Path("own.py").write_text(OWN)
    Path("neighbour.py").write_text("SEED = 40\n")
    Path("pack").mkdir()
    Path("pack/recipes.py").write_text(
        "from lgp_dist.recipes import pool12\nfrom pack.sizes import SEED\nfrom dataclasses import replace\n"
        "def pool24():\n    return replace(pool12(), seed=SEED)\n"
    )
    Path("pack/sizes.py").write_text("SEED = 24\n")
    before, path = dict(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    own_recipe.OWN.clear()
    for name in sys.modules.keys() - before.keys():
        if name.split(".")[0] in ("pack", "neighbour") or name.startswith("recipes_of_"):
            del sys.modules[name]


def test_file_and_module() -> None:
    assert recipe_of("own.py:mine") == replace(tiny(), recipe="own.py:mine", seed=42)
    assert recipe_of("pack.recipes:pool24") == replace(pool12(), recipe="pack.recipes:pool24", seed=24)
    assert recipe_of(str(Path("own.py").resolve()) + ":mine").directory == "runs/mine"


WRONG = {
    "run nope.py:mine": ("nope.py cannot be read (No such file or directory)", "lgp new nope.py"),
    "run pack.py:mine": ("pack.py cannot be read (Is a directory)",),
    "run own.py": ("own.py does not say which function", "write own.py:mine"),
    "run own.py:": ("own.py does not say which function",),
    "run own.py:mint": ("own.py has no function 'mint'", "the nearest is mine"),
    "run own.py:SEED": ("own.py has no function 'SEED'",),
    "run own.py:number": ("own.py:number returns int, not a RunConfig",),
    "run own.py:broken": ("own.py:broken raises KeyError in line 19 of own.py ('key')", "correct the recipe"),
    "run own.py:needs": ("own.py:needs takes 'more'", "called without arguments"),
    "run own.py:leaves": ("own.py:leaves raises SystemExit in line 21 of own.py (0)",),
    "run own.py:misspelt": ("own.py:misspelt raises TypeError in line 22 of own.py", "'sead'"),
    "run own.py:text": ("In what own.py:text returns, data.image_size is 'big', but must be of type int",),
    "run own.py:flag": ("seed is True, but must be of type int",),
    "show own.py:word": ("finetune.policy is 'spred', but must be of type Literal['independent', 'shared',",),
    "paths own.py:row": ("model.rows.0.width is 9.5, but must be of type int",),
    "run own.mine": ("There is no recipe 'own.mine'", "write FILE.py:FUNCTION"),
    "run syntax.py:mine": ("syntax.py raises IndentationError in line 2 of syntax.py",),
    "run imports.py:mine": ("imports.py raises ModuleNotFoundError in line 1 of imports.py", "no_such_package"),
    "run no_such_package.recipes:mine": ("There is no module no_such_package.recipes",),
    "run pack.recipe:mine": ("There is no module pack.recipe",),
    "run pack.recipes:pool2": ("pack.recipes has no function 'pool2'", "the nearest is pool24"),
    "paths own.py:mine --finetune.polcy shared": ("lgp paths own.py:mine has no option --finetune.polcy",),
    "run own.py:mine tiny": ("lgp run own.py:mine does not take the word 'tiny'",),
    "descend own.py:mint": ("own.py has no function 'mint'",),
    "launch check launch.yaml --recipe own.py:mint": ("own.py has no function 'mint'",),
    "show tiny --diff tyny": ("There is no recipe 'tyny'", "the nearest is tiny"),
    "new own.py": ("own.py is there already",),
    "new own.txt": ("own.txt names no recipe", "flowers.py"),
    "new my-own.py": ("my-own.py names no recipe",),
    "new class.py": ("class.py names no recipe",),
    "new replace.py": ("replace.py names no recipe",),
    "new new.py --from own.py:mine": ("--from names 'own.py:mine', which is no recipe of this package",),
    "new new.py --data nowhere": ("There is no folder nowhere",),
    "shards sample --out pack": ("pack is there already",),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong(words: str, lgp: Lgp) -> None:
    Path("pack.py").mkdir()
    Path("syntax.py").write_text("def mine():\nreturn 1\n")
    Path("imports.py").write_text("import no_such_package\n")
    before = sorted(Path().rglob("*.py")), Path("own.py").read_text()
    has(lgp(*words.split()).sentence, *WRONG[words])
    assert before == (sorted(Path().rglob("*.py")), Path("own.py").read_text())


def test_a_command_takes_it_as_a_built_in_one(lgp: Lgp) -> None:
    """Costs of paths, help and what differs; the launch check's command names it."""
    assert lgp("paths", "own.py:mine", "--json").out == lgp("paths", "tiny", "--json").out
    has(lgp("paths", "own.py:mine", "--help").out, "usage: lgp paths own.py:mine", "Tiny with another seed.")
    has(lgp("run", "own.py:mine", "--help", "finetune.train").out, "--finetune.train.lr")
    assert lgp("show", "own.py:mine", "--diff", "tiny").out.split() == ["setting", "value", "seed", "42", "(tiny", "0)"]
    assert json.loads(lgp("show", "own.py:mine", "--diff", "tiny", "--json").out) == {"seed": 42}
    assert json.loads(lgp("show", "own.py:mine", "--json").out) == flatten(recipe_of("own.py:mine"))
    words = ("bench", "sampler", "--policies", "shared", "--steps", "4", "--ranks", "2", "--micro-steps", "4")
    has(lgp(*words, "--recipe", "own.py:mine").out, "own.py:mine", "shared")
    assert lgp("show", "tiny", "--diff", "tiny").out == "Nothing differs from tiny.\n"


def test_a_run_lists_what_differs_from_it_and_a_study_names_it() -> None:
    config = replace(recipe_of("own.py:mine"), seed=3)
    assert differences(config) == ["seed 3 (recipe 42)"]
    assert arguments(config) == ["own.py:mine", "--seed", "3"]
    assert own_recipe.source_of("own.py:mine") == OWN


def test_a_name_from_data_imports_nothing() -> None:
    """Only the command line's words do: what a run's files say is a text."""
    Path("own.py").write_text("raise SystemExit('imported')")
    config = replace(tiny(), recipe="own.py:mine")
    assert differences(config) == [] and own_recipe.source_of(config.recipe) == ""


@pytest.mark.parametrize("name", RECIPES)
def test_a_new_recipe_is_the_one_that_it_starts_from(name: str, lgp: Lgp) -> None:
    assert lgp("new", "flowers.py", "--from", name).status == 0
    assert recipe_of("flowers.py:flowers") == replace(RECIPES[name](), recipe="flowers.py:flowers")
    text = Path("flowers.py").read_text()
    assert all(len(line) <= 120 or "RowConfig(" in line for line in text.splitlines())
    has(text, "# Passes over the training split.", "# Number of classes; labels are 0 .. num_classes - 1.")


def test_a_new_recipe_may_have_the_name_of_its_base(lgp: Lgp) -> None:
    assert lgp("new", "tiny.py", "--from", "tiny").status == 0
    assert recipe_of("tiny.py:tiny") == replace(tiny(), recipe="tiny.py:tiny")


def test_a_new_recipe_is_to_be_changed(lgp: Lgp) -> None:
    assert call_main(("new", "flowers.py")) == 0
    text = Path("flowers.py").read_text()
    Path("flowers.py").write_text(text.replace("image_size=28", "image_size=56").replace("width=96", "width=128"))
    shown = json.loads(lgp("show", "flowers.py:flowers", "--diff", "tiny", "--json").out)
    assert shown == {"data.image_size": 56, "model.rows.1.width": 128}
    assert os.listdir().count("flowers.py") == 1
