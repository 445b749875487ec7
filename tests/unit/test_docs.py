"""Pages for people: every command parses, every file, setting, link and page of the site is there."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from itertools import dropwhile
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
from accelerate.commands.launch import launch_command_parser
from docs_helpers import PAGES, ROOT, Command, broken, commands, files_named, settings_named
from run_helpers import call_main

from lgp_dist.cli.parse import Call
from lgp_dist.config.flat import flatten
from lgp_dist.config.own_recipe import is_own
from lgp_dist.recipes import RECIPES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITH_OPTIONS = ("prove_exact", "same_numbers", "soak", "torture", "try_slurm")
"""Scripts whose options the file of the same name in tests/distributed reads."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Hands arguments to the real `lgp`, which parses them and then does nothing; gives its complaint, or nothing.

    named: they only name a command; its help is asked for.
    """
    monkeypatch.setattr(Call, "__call__", lambda call: None)
    monkeypatch.chdir(ROOT)

    def parse(*arguments: str, named: bool = False) -> str:
        capfd.readouterr()
        status = call_main((*arguments, "--help") if named else arguments)
        output = capfd.readouterr()
        if named and not output.out.startswith(f"usage: lgp {' '.join(arguments)} "):
            return f"lgp has no {' '.join(arguments)}"  # whose help is that of the command around it
        return "" if status == 0 else f"status {status}\n{output.err}{output.out}"

    return parse


@cache
def options_of(script: str) -> frozenset[str]:
    """Fields of classes and arguments of functions of a script's Python file: what tyro makes options of."""
    tree = ast.parse((ROOT / f"tests/distributed/{script}.py").read_text())
    fields = {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")
    }
    return frozenset(fields | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)})


def complaint(command: Command, parse: Callable[..., str]) -> str:
    """What is wrong with a command; empty if nothing."""
    program, *rest = ("tiny" if ":" in word and is_own(word) else word for word in command.words)
    if program == "lgp":
        return parse(*rest, named=command.named)
    if command.named:
        return ""
    if program == "accelerate":
        return launched(launch_command_parser(), rest[1:], "lgp_dist", parse)
    if program == "torchrun":
        return launched(torchrun.get_args_parser(), rest, "lgp_dist", parse)
    if program == "sbatch":
        rest = list(dropwhile(lambda word: word.startswith("--"), rest))
        return not_a_script(rest[0]) or parse(*rest[1:])
    if program == "pip":
        wanted = [
            extra for word in rest for found in re.findall(r"lgp_dist\[(.*)\]", word) for extra in found.split(",")
        ]
        missing = set(wanted) - PROJECT["optional-dependencies"].keys()
        return f"no extras {missing}" if missing else ""
    return not_a_script(program) or script_arguments(Path(program).name, rest, parse)


def launched(parser: object, words: list[str], module: str, parse: Callable[..., str]) -> str:
    """What is wrong with a launcher's own arguments, its files, or those of `lgp` after them."""
    try:
        found = parser.parse_args(words)  # type: ignore[attr-defined]
    except SystemExit:
        return "the launcher does not take this"
    file = getattr(found, "config_file", None)
    if not found.module and (ROOT / found.training_script).is_file():
        return ""  # an example, which a test of its own runs
    if found.training_script != module or not found.module:
        return f"starts {found.training_script}, not -m {module}"
    if file and not (ROOT / file).is_file():
        return f"no file {file}"
    return parse(*found.training_script_args)


def not_a_script(name: str) -> str:
    return "" if os.access(ROOT / name, os.X_OK) and (ROOT / name).is_file() else f"no script {name}"


def script_arguments(script: str, rest: list[str], parse: Callable[..., str]) -> str:
    """What is wrong with the arguments of a script of ours."""
    if script == "quickstart":
        return parse("run", "tiny", *rest)
    if script == "run_pool12":
        return parse("finetune", "pool12", *rest)
    if script in WITH_OPTIONS:
        unknown = {word[2:].replace("-", "_") for word in rest if word.startswith("--")} - options_of(script)
        return f"no options {unknown}" if unknown else ""
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one(page: str, parsed: Callable[..., str]) -> None:
    found = commands(page, (ROOT / page).read_text())
    wrong = [f"{command.text}\n{text}" for command in found if (text := complaint(command, parsed))]
    assert not wrong, "\n".join(wrong)


def test_commands_are_found() -> None:
    """The search itself: blocks, fences, tables, alternatives, continued lines, words after a command."""
    text = "\n".join(
        [
            "Text `lgp paths tiny --json`, `lgp shards` and `lgp`.",
            "",
            "    lgp shards verify | show   both",
            "    accelerate launch --config_file launch_configs/FILE [--zero_stage 0|1] \\",
            "        -m lgp_dist STAGE RECIPE    # a rank each",
            "",
            "```",
            "A=1 lgp report RUN RUN ... [--snnet FILE] > table.md",
            "```",
            "| a | `scripts/torture --seed S` | `lgp bench paths RECIPE ... --out FILE` |",
            "| b | `lgp bench data --folder ...` |",
        ]
    )
    launch = "accelerate launch --config_file launch_configs/cpu_2.yaml --zero_stage {} -m lgp_dist finetune tiny"
    assert [" ".join(command.words) for command in commands("page", text)] == [
        "lgp shards verify",
        "lgp shards show",
        launch.format(0),
        launch.format(1),
        "lgp report runs/tiny runs/other --snnet some.file",
        "lgp paths tiny --json",
        "scripts/torture --seed 1",
        "lgp bench paths",
        "lgp bench data --folder name",
        "lgp shards",
    ]
    everywhere = [command for page in PAGES for command in commands(page, (ROOT / page).read_text())]
    assert len(everywhere) > 100 and {command.words[0].split("/")[0] for command in everywhere} == {
        *("lgp", "accelerate", "torchrun", "sbatch", "pip", "scripts")
    }


@pytest.mark.parametrize(
    "line",
    [
        "lgp shards verify shards/sample --wrong",
        "lgp shards verify",
        "lgp shards verify | polish",
        "text `lgp shards polish`",
        "lgp finetune tiny --finetune.policy shred",
        "lgp descend RUN --max-parameters 10M",
        "lgp descend RUN --max-params many",
        "accelerate launch --config_fil launch_configs/cpu_2.yaml -m lgp_dist finetune tiny",
        "accelerate launch --config_file launch_configs/none.yaml -m lgp_dist finetune tiny",
        "accelerate launch --config_file launch_configs/cpu_2.yaml -m lgp_dist finetune",
        "torchrun --standing -m lgp_dist finetune tiny",
        "sbatch launch_configs/none.sh run tiny",
        "sbatch README.md run tiny",
        "pip install 'lgp_dist[imagenet,none]'",
        "scripts/none",
        "scripts/quickstart --finetune.policy shred",
        "scripts/torture --second 3",
    ],
)
def test_wrong_command_is_found(line: str, parsed: Callable[..., str]) -> None:
    assert any(complaint(command, parsed) for command in commands("page", line if "`" in line else f"\n    {line}"))


def not_there(text: str) -> set[str]:
    """Files and settings that a page names and nobody has."""
    known = {key for recipe in RECIPES.values() for key in flatten(recipe())}
    settings = {name for name in settings_named(text) if name.replace(".no_", ".") not in known}
    return settings | {file for file in files_named(text) if not (ROOT / file).exists()}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_settings_are_there(page: str) -> None:
    assert not not_there((ROOT / page).read_text())


def test_missing_file_and_setting_are_found() -> None:
    text = "`scripts/none --data.rot X` of `lgp_dist/none.py` and `tests/conftest.py`, `--model.no-final-norm`\n"
    assert not_there(text) == {"scripts/none", "lgp_dist/none.py", "data.rot"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not broken(page, (ROOT / page).read_text())


def test_broken_link_is_found() -> None:
    text = "# One\n\n[a](#one) [b](#two) [c](start.md#results) [d](start.md#none) [e](none.md) [f](https://none)\n"
    assert broken("docs/page.md", text) == [
        "docs/page.md: #two: no such heading",
        "docs/page.md: start.md#none: no such heading",
        "docs/page.md: none.md: no such file",
    ]


def test_every_page_has_its_place_in_the_site() -> None:
    def pages(entries: list[object]) -> list[str]:
        found: list[str] = []
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                found += pages(value) if isinstance(value, list) else [str(value)]
        return found

    listed = pages(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    assert len(listed) == len(set(listed))
    written = {page for page in listed if not page.startswith("api/")}
    made_of = [ROOT / page for page in written]  # the tutorial of a Python file
    assert all(page.exists() or page.with_suffix(".py").exists() for page in made_of)
    assert set(PAGES) <= written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--help", "finetune-descendant"),
        ("study --help", "stitch_init"),
        ("shards verify shards/sample", "every shard and image is whole"),
    ],
)
def test_a_process_of_its_own_answers(arguments: str, expected: str) -> None:
    """Every command runs in tests/integration/test_documented_commands.py; these see package and sample as they are."""
    words = [sys.executable, "-m", "lgp_dist", *arguments.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and expected in done.stdout, done.stderr
