"""What the command line offers, and that it answers at once."""

import json
import os
import re
import subprocess
import sys

import pytest
from run_helpers import LIMIT_S, SAMPLE, Lgp, has

from lgp_dist.cli import COMMANDS, GROUPS
from lgp_dist.cli.stages import SUMMARIES
from lgp_dist.config.flat import STAGES, depends_on, flatten, stage_settings
from lgp_dist.errors import OUTPUT_CLOSED
from lgp_dist.files import LOCK, locked
from lgp_dist.recipes import RECIPES, tiny

FIELDS = ["key", "low", "high", "low_row", "high_row", "stitch", "params", "params_paper", "flops", "cfg_id"]
FIELDS += ["top1", "top5"]
HEAVY = {"torch", "torchvision", "timm", "deepspeed", "accelerate", "transformers", "matplotlib", "webdataset"}

ON_SAMPLE = f"tiny --data.root {SAMPLE}"
WRONG = {
    # commands, actions and recipes
    "": ("lgp needs a command", "lgp --help"),
    "finetun tiny": ("lgp has no command 'finetun'", "the nearest is finetune"),
    "--debug run tiny": ("lgp has no command '--debug'", "lgp --help"),
    "bench pathz tiny": ("lgp bench has no action 'pathz'", "the nearest is paths"),
    "shards": ("lgp shards needs an action", "lgp shards --help"),
    "launch chek launch.yaml": ("'chek'", "the nearest is check"),
    "run": ("lgp run needs a recipe, such as tiny",),
    "run tyny": ("There is no recipe 'tyny'", "the nearest is tiny"),
    "finetune --seed 3": ("lgp finetune needs a recipe",),
    "paths --json pol12": ("lgp paths needs a recipe",),
    "run tiny pool12": ("lgp run tiny does not take the word 'pool12'",),
    "study tiny": ("lgp study needs QUESTION and a recipe",),
    "study rowz tiny": ("QUESTION is 'rowz'", "stitch_init, rows, ", "the nearest is rows"),
    "study rows tiny --variants row_ly": ("--variants names 'row_ly'", "the nearest is row_lr"),
    "launch check launch.yaml --recipe tyny": ("There is no recipe 'tyny'", "the nearest is tiny"),
    "descend tyny": ("tyny is neither a recipe nor the directory of a run", "the nearest is tiny"),
    # options
    "distil tiny --distil.alhpa 0.3": ("lgp distil tiny has no option --distil.alhpa", "the nearest is --distil.alpha"),
    "run tiny --finetune.lr=0.1": ("no option --finetune.lr", "the nearest is --finetune.train.lr"),
    "run tiny --lr 0.1": ("no option --lr", "--ancestry.train.lr, --distil.train.lr, --finetune.train.lr"),
    "run tiny --model.rows.2.width 8": ("no option --model.rows.2.width", "the nearest is --model.rows.1.width"),
    "run tiny --zzz": ("no option --zzz", "lgp run tiny --help"),
    "run tiny --help bugdet": ("lgp run tiny has no section 'bugdet'", "the nearest is budget"),
    "paths tiny --jsn": ("lgp paths tiny has no option --jsn", "the nearest is --json"),
    "bench paths tiny": ("lgp bench paths tiny needs --out",),
    "bench paths tiny --oot x": ("no option --oot", "the nearest is --out"),
    "descend run --max-parameters 1": ("lgp descend has no option --max-parameters", "the nearest is --max-params"),
    "doctor --dta x": ("lgp doctor has no option --dta", "the nearest is --data"),
    "checkpoint verify": ("lgp checkpoint verify needs PATH",),
    # values of each type
    "run tiny --engine.precision bf61": ("--engine.precision is 'bf61'", "fp32, bf16 or fp16", "the nearest is bf16"),
    "run tiny --finetune.policy=balancd": ("--finetune.policy is 'balancd'", "the nearest is balanced"),
    "run tiny --export.formats pt2 onx": ("--export.formats is 'onx'", "pt2, onnx or int8", "the nearest is onnx"),
    "run tiny --distil.train.epochs ten": ("--distil.train.epochs is 'ten'", "takes a number", "for example"),
    "run tiny --model.rows.0.width=x": ("--model.rows.0.width is 'x'", "takes a whole number", "32"),
    "run tiny --seed 1.5": ("--seed is '1.5'", "takes a whole number"),
    "run tiny --finetune.row_lr 1 x": ("--finetune.row-lr is '1 x'", "takes numbers", "1.0 0.1"),
    "run tiny --data.augment.crop-scale 0.5": ("--data.augment.crop-scale is '0.5'", "takes 2 numbers", "0.8 1.0"),
    "run tiny --budget.max-params many": ("--budget.max-params is 'many'", "10M"),
    "run tiny --finetune.sandwich yes": ("--finetune.sandwich takes no value", "'yes'"),
    "run tiny --resume": ("--resume has no value",),
    "run tiny --distil.alpha 7": ("distil.alpha is 7", "from 0 to 1"),
    "launch check launch.yaml --nodes two": ("--nodes is 'two'", "takes a whole number"),
    "shards build kagle --out new": ("LAYOUT is 'kagle'", "imagefolder, ", "the nearest is kaggle"),
    "bench sampler --policies shard": ("--policies names 'shard'", "the nearest is shared"),
    "bench sampler --recipe pool12,tyny": ("--recipe names 'tyny'", "the nearest is tiny"),
    # paths of a pool
    "paths sws_tiny --model.two-way": ("model.two_way is for pools of stitched rows", "model.stages"),
    "paths nested_tiny --model.rows.0.depth 3": ("model.rows.0.depth is for pools of stitched rows", "model.widths"),
    "paths tiny --model.stitch-rank 32": ("model.stitch_rank is 32", "below the narrowest row's width 32"),
    "paths tiny --model.rows.1.depth 1": ("model.rows.1.depth is 1", "2 blocks or more"),
    "run tiny_paper --model.two-way": ("pool.stitch_init is transformation_paper", "least_squares"),
    "run tiny --finetune.bin-flops -1": ("finetune.bin_flops is -1", "must be 0 or more"),
    "run tiny --distil.train.lr inf": ("distil.train.lr is inf", "must be 0 or more and finite"),
    'new w"/x.py': ('w"/x.py names no recipe', "flowers.py"),
    "run tiny --export.path r0.0-9": ("The pool has no path 'r0.0-9'", "the nearest is r0.0-5", "lgp paths"),
    "run tiny --finetune.only r0.0-9": ("finetune.only names 'r0.0-9'", "the nearest is r0.0-5", "lgp paths"),
    "export run --path r1.0-9 --out new": ("The pool has no path 'r1.0-9'", "the nearest is r1.0-5"),
    # files and folders
    "run tiny --data.root nowhere": ("There is no folder nowhere",),
    "run tiny --data.root run": ("run/manifest.json does not exist", "lgp shards index run"),
    f"run {ON_SAMPLE} --resume latset": ("--resume is 'latset'", "auto, latest, never", "the nearest is latest"),
    f"run {ON_SAMPLE} --resume true": ("--resume is 'true'", "no checkpoint (a folder with manifest.json)"),
    f"run {ON_SAMPLE} --resume run": ("--resume is 'run'", "no checkpoint (a folder with manifest.json)"),
    f"run {ON_SAMPLE} --run-dir run/config.json/x": ("run/config.json", "--run-dir"),
    "descend rum": ("rum is neither a recipe nor the directory of a run", "the nearest is run"),
    "export empty --path r0.0-5 --out new": ("empty holds no evaluated run", "lgp evaluate"),
    "export run --path r0.0-5 --out run": ("run is there already", "--out"),
    "export run --out new": ("lgp export RUN writes one path or all", "--path KEY or --all"),
    "export run --path r0.0-5 --all --out new": ("one path or all",),
    "export run --path r0.0-5 --latency-table t.csv --out new": ("--latency-table is for the paths of --all",),
    "descend run --latency-table t.csv --batch 4": ("--latency-table", "leave out --device, --batch and --dtype"),
    "descend run --latency-table nowhere.csv": ("--latency-table nowhere.csv cannot be read",),
    "bench latency empty --out t.csv": ("empty has no paths.json with graphs", "lgp export RUN --all"),
    "bench latency empty --out t.csv --batch 0": ("--batch is 0 and --threads 0", "at least 1 and 0"),
    "push empty me/name": ("empty has no README.md", "lgp export"),
    "push exported name": ("NAME is 'name'", "USER/NAME"),
    "push exported me/name": ("no token of the hub", "HF_TOKEN", "hf auth login"),
    "report run rum": ("rum is no run directory", "the nearest is run"),
    f"finetune-descendant empty --data {SAMPLE}": ("empty/config.json", "lgp export"),
    "launch check nowhere.yaml": ("The launch file nowhere.yaml cannot be read",),
    "checkpoint show empty": ("empty holds no checkpoint",),
    "shards verify nowhere": ("There is no folder nowhere",),
    f"run {ON_SAMPLE} --data.num-classes 8": ("data.num_classes is 8", f"{SAMPLE} names 10 classes"),
    # a second writer
    f"run {ON_SAMPLE} --run-dir held": ("held is being written by process", "--run-dir"),
    "study rows tiny --out held": ("held is being written by process", "--out"),
    "report run --out held": ("held is being written by process", "--out"),
    "export run --path r0.0-5 --out held-too": ("held-too is being written by process", "--out"),
    f"finetune-descendant empty --data {SAMPLE} --out held": ("held is being written by process", "--out"),
    # settings that would have no effect
    f"finetune-descendant empty --data {SAMPLE} --export.path r0.0-5": ("has no option --export.path",),
    "specialise run --path r0.0-5 --max-params 10M": ("--path", "--max-params", "leave them out"),
    "run tiny --specialise.epochs 2": ("specialise.epochs", "specialise.top"),
    "launch check launch.yaml --data shards": ("--data", "--recipe"),
    # launchers' variables, before the command
    f"WORLD_SIZE=two run {ON_SAMPLE}": ("WORLD_SIZE is 'two'", "a whole number"),
    f"LOCAL_WORLD_SIZE=0 run {ON_SAMPLE}": ("LOCAL_WORLD_SIZE is '0'", "a whole number"),
    f"WORLD_SIZE=2 run {ON_SAMPLE}": ("WORLD_SIZE is 2", "RANK, LOCAL_RANK", "accelerate launch"),
    f"OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 run {ON_SAMPLE}": ("OMPI_COMM_WORLD_SIZE is 2", "MPI"),
    f"PMI_SIZE=2 finetune {ON_SAMPLE}": ("PMI_SIZE is 2", "MPI", "accelerate launch"),
    f"MV2_COMM_WORLD_SIZE=4 WORLD_SIZE= run {ON_SAMPLE}": ("MV2_COMM_WORLD_SIZE is 4", "MPI"),
    f"ACCELERATE_USE_DEEPSPEED=1 run {ON_SAMPLE}": ("ACCELERATE_USE_DEEPSPEED is '1'", "true or false"),
    f"ACCELERATE_USE_FSDP=true run {ON_SAMPLE}": ("use_fsdp=true", "ACCELERATE_USE_FSDP"),
    f"WORLD_SIZE= RANK= run {ON_SAMPLE} --resume latset": ("--resume is 'latset'",),
}
"""What is typed after `lgp` -> pieces of the sentence that answers."""

ANSWER = """
import contextlib, io, json, os, sys
from unittest.mock import patch
from lgp_dist.cli import main
answers = []
for line in json.load(sys.stdin):
    words = line.split()
    given = dict(word.split("=", 1) for word in words if "=" in word and word.split("=")[0].isupper())
    sys.argv, said = ["lgp", *words[len(given) :]], io.StringIO()
    with contextlib.redirect_stderr(said), patch.dict(os.environ, given):
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
    answers.append((status, said.getvalue(), sorted(set(sys.modules) & set(HEAVY))))
json.dump(answers, sys.stdout)
""".replace("HEAVY", repr(sorted(HEAVY)))
"""Runs command lines in a process without torch; for each its status, what it said, and heavy modules so far."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """How `lgp` answers WRONG, in a folder with the record of an evaluated run."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "launch.yaml").write_text("num_processes: 1\n")
    (folder / "exported").mkdir()
    for name in ("README.md", "model.safetensors", "verify.json"):
        (folder / "exported" / name).touch()
    evaluated = folder / "run" / "evaluate" / "artifact.json"
    evaluated.parent.mkdir(parents=True)
    config = {**depends_on(stage_settings(tiny()), "evaluate"), "data.train": "of the shards"}
    record = {"stage": "evaluate", "id": "0", "config": config, "inputs": {}, "files": {}, "facts": {}}
    evaluated.write_text(json.dumps(record))
    (folder / "run" / "config.json").write_text(json.dumps(flatten(tiny())))
    (evaluated.parent / "paths.json").write_text(json.dumps([{"key": "r0.0-5"}]))
    call = [sys.executable, "-c", ANSWER]
    with locked(folder / "held" / LOCK), locked(folder / ".held-too.lock"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment["HF_HOME"] = str(folder)  # without a token
        words = json.dumps(list(WRONG))
        done = subprocess.run(call, cwd=folder, input=words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(WRONG, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_input_is_answered_at_once(answers: dict[str, tuple[int, str, list[str]]], line: str) -> None:
    """One sentence that names what is wrong and the nearest right thing, status 2, and nothing heavy was imported."""
    status, said, heavy = answers[line]
    assert status == 2 and said.startswith("lgp: ") and said.endswith(".\n") and said.count("\n") == 1, said
    has(said, *WRONG[line])
    assert not heavy


def test_what_a_command_does_not_read_is_said(lgp: Lgp) -> None:
    """And it does what it does without these settings."""
    said = lgp("paths", "tiny", "--model.depth", "4", "--finetune.train.lr", "1", "--export.path", "r0.0-3")
    has(said.err, "not read by this command: finetune.train.lr, export.path\n")
    plain = lgp("paths", "tiny", "--model.depth", "4")
    assert (plain.out, plain.err) == (said.out, "")


def test_help_answers_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lgp_dist", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "tyro" in imported and not imported & HEAVY
    assert all(name in done.stdout for name in (*STAGES, "run", "paths", "shards", "bench", "study", "report"))


def test_output_that_nobody_reads_is_no_traceback() -> None:
    """`lgp ... | head` ends without a word once head has left; here it has left before anything is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lgp_dist", "run", "tiny", "--help", "all"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (OUTPUT_CLOSED, "")


def test_the_front_page_has_every_command(lgp: Lgp) -> None:
    """Each in one line, with what it does."""
    lines = lgp("--help").out.splitlines()
    shown = {name.split()[0] for rows in GROUPS.values() for name in rows}
    assert shown == {name.split()[0] for name in COMMANDS}
    assert list(SUMMARIES) == [*STAGES, "run"]
    for rows in GROUPS.values():
        assert all(any(line.split() == [*name.split(), *text.split()] for line in lines) for name, text in rows.items())


@pytest.mark.parametrize("stage", [*STAGES, "run", "paths"])
def test_every_stage_takes_every_recipe(lgp: Lgp, stage: str) -> None:
    listed = lgp(stage, "--help")
    assert listed.status == 0 and all(name in listed.out for name in RECIPES)
    shown = lgp(stage, "snnet_deit", "--help")
    assert shown.status == 0 and " model.rows.2 " in shown.out and " finetune.train " in shown.out
    assert (RECIPES["snnet_deit"].__doc__ or "").splitlines()[0] in " ".join(shown.out.split())


def test_help_of_a_section(lgp: Lgp) -> None:
    """The fields of this section alone, with the recipe's values; all sections, and the settings of none."""
    shown = lgp("run", "tiny", "--help", "finetune.train")
    assert shown.status == 0 and set(re.findall(r"--(\w+\.)", shown.out)) == {"finetune."}
    assert re.search(r"--finetune\.train\.lr FLOAT\b[^-]*\(default: 0\.002\)", shown.out)
    assert lgp("run", "tiny", "--help", "--finetune.train.lr").out == shown.out
    assert "--distil.alpha" in lgp("paths", "tiny", "--help", "all").out
    for command in (("run", "tiny", "--help"), ("bench", "paths", "tiny", "--help", "run")):
        general = lgp(*command).out
        assert "--run-dir" in general and "--finetune.train.lr" not in general
    assert "--out" in lgp("bench", "paths", "tiny", "--help").out


@pytest.mark.parametrize("words", [name for name in COMMANDS if " " in name])
def test_actions_have_help(lgp: Lgp, words: str) -> None:
    shown = lgp(*words.split(), "--help")
    assert shown.status == 0 and shown.out.startswith(f"usage: lgp {words} ")
    listed = lgp(words.split()[0], "--help")
    assert listed.status == 0 and f"\n  {words.split()[1]} " in listed.out


@pytest.mark.parametrize(("recipe", "count"), [("tiny", 18), ("pool12", 18), ("pool18", 27), ("snnet_v2_s_l", 134)])
def test_paths_as_json(lgp: Lgp, recipe: str, count: int) -> None:
    result = lgp("paths", "--json", recipe)
    rows = json.loads(result.out)
    assert (result.status, result.err, len(rows)) == (0, "", count)
    assert all(list(row) == FIELDS for row in rows)
    assert len({row["key"] for row in rows}) == count
    assert [row["flops"] for row in rows] == sorted(row["flops"] for row in rows)
    assert all(row["top1"] is None and row["top5"] is None for row in rows)


def test_paths_as_text_has_the_published_numbers(lgp: Lgp) -> None:
    """METHOD, section 3: parameters as the paper counts them, and the pool's size."""
    lines = lgp("paths", "pool12").out.splitlines()
    paper = {line.split()[-2] for line in lines[1:-1]}
    assert {"3.05", "10.38", "10.82", "17.02", "17.47", "23.66", "30.31", "36.95", "44.04"} <= paper
    assert lines[-1] == "18 paths, 5 stitch layers, 47.83 M stored"


def test_paths_as_text_shows_the_cost_of_small_models_too(lgp: Lgp) -> None:
    lines = lgp("paths", "tiny").out.splitlines()
    shown = [float(line.split()[-1]) for line in lines[1:-1]]
    assert lines[0].endswith("FLOPs (M)")
    exact = [row["flops"] / 1e6 for row in json.loads(lgp("paths", "tiny", "--json").out)]
    assert shown == pytest.approx(exact, abs=0.005)


def test_overrides_reach_the_paths(lgp: Lgp) -> None:
    assert len(json.loads(lgp("paths", "pool12", "--json", "--model.depth", "4").out)) == 12
    assert len(json.loads(lgp("paths", "--model.depth", "4", "--json", "pool12").out)) == 12
    result = lgp("paths", "pool12", "--model.rows.0.width", "800")
    has(result.sentence, "model.rows has widths [800, 768]", "narrow to wide")
