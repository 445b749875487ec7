"""Every `lgp` command of README and docs runs, at toy size and in this process, and makes what it names.

A page's command is followed by what makes it small; launchers in front of it are left to tests/distributed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_helpers import photograph
from docs_helpers import PAGES, ROOT, Command, commands
from run_helpers import PLAIN, SMALL, Lgp, call_main, write_ancestry
from shard_helpers import LAYOUTS, idx_files, image, quiet

from lgp_dist.bench import step as bench_step
from lgp_dist.bench.loaders import data as bench_data
from lgp_dist.bench.loaders import loaders as loader_module
from lgp_dist.config.flat import STAGES
from lgp_dist.data.build.build import BuildOptions, build_shards
from lgp_dist.models.build import ancestry_vit
from lgp_dist.recipes import RECIPES, tiny
from lgp_dist.run.tensors import save_tensors

pytestmark = pytest.mark.slow  # runs of whole stages

STAGE = rf"({'|'.join(STAGES)})"
RECIPE = r"(tiny|tiny_paper|sws_tiny|snnet_tiny|snnet_v2_tiny|nested_tiny)"
LIKE = {
    "pool12": "tiny_paper",
    "pool12_plus": "tiny",
    "snnet_deit": "snnet_tiny",
    "snnet_v2_s_l": "snnet_v2_tiny",
    "sws_base": "sws_tiny",
    "nested_base": "nested_tiny",
}
"""Recipe that needs ImageNet -> one that does the same on 28 x 28 pixels; only where images are read."""

CLASSES = 37
"""Of a person's own images, as the page has it."""

OWN = ("--run-dir", "--data", "--ancestry", *PLAIN)
TRAINED = " ".join(option for option in SMALL[1:] if not option.startswith(OWN))
SMALLER = {
    rf"(run|{STAGE}) {RECIPE}\b(?!.*--help)": f"{TRAINED} --ancestry.train.max-steps=2 --ancestry.train.batch-size=8"
    " --pool.samples=16 --engine.device=cpu",
    r"run tiny --finetune\.train\.accumulate 1": "--finetune.train.accumulate 4",  # one rank in place of eight
    r"finetune-descendant ": "--train.max-steps 2 --train.batch-size 8 --engine.precision fp32 --engine.device cpu"
    " --engine.threads 1 --threads 0 --val-split test --export.images 2 --export.formats",
    r"export runs/(?!.*(--formats|--all))": "--formats",
    r"export runs/.*--all": "--formats onnx",
    r"export runs/": "--images 2",
    r"descend runs/": "--device cpu",
    r"descend .*--max-latency-ms": "--max-latency-ms 1e6",
    r"descend .*--latency-table": "--latency-table latencies.csv",
    r"shards (build|reshard) ": "--workers 1",
    r"shards build fashion-mnist ": "--source folder",
    r"bench (train|peers|checkpoint|engine|paths|step|distil) ": "--engine.device=cpu --engine.threads=1",
    r"bench (train|peers|checkpoint|engine) ": "--rounds 1 --steps 2 --finetune.train.batch-size 4",
    r"bench .*--data\.image-size 32": "--data.image-size 28",
    r"bench peers ": "--workers 0",
    r"bench paths ": "--batch 2 --repeats 1",
    r"bench distil ": "--batch 2 --repeats 1",
    r"bench step ": "--batch 2 --repeats 1 --no-compiled",
    r"bench sampler ": "--steps 20 --ranks 1,8",
    r"bench scaling ": "--ranks 1,8",
    r"bench data ": "--photos photographs --samples 8 --threads 1 --batch 4 --repeats 1 --loaders webdataset,lgp",
}
"""What a command begins with -> options appended to make it small; of two equal options the last counts."""

ELSEWHERE = {
    r"lgp study": (
        "three seeds of every variant, each run a process",
        "tests/integration/test_study.py::test_a_killed_study_gives_the_table_of_its_commands",
    ),
    r"lgp (run flowers\.py:flowers|descend runs/flowers .*|predict runs/flowers/export .*)": (
        "one after the other, on photographs",
        "tests/integration/test_own_data.py::test_the_page_leads_from_photographs_to_a_prediction",
    ),
    r"lgp run my_recipes\.py:my_recipes": (
        "a recipe for ImageNet",
        "tests/integration/test_own_recipes.py::test_a_run_of_an_own_recipe",
    ),
    r"accelerate launch .* examples/two_branches\.py .*": (
        "two ranks",
        "tests/distributed/test_two_branches.py::test_ranks_equal_one_process",
    ),
    r"lgp ancestry pool12_plus .*--check": (
        "images of 224 pixels and a source on the hub",
        "tests/integration/test_any_ancestry.py::test_what_is_said_before_anything_trains",
    ),
    r"lgp run pool12_plus --ancestry\.model": (
        "weights of the hub",
        "tests/integration/test_systems.py::test_an_anchor_from_the_hub_is_the_hubs",
    ),
    r"lgp push": ("an account of the hub", "tests/unit/test_push.py::test_a_folder_becomes_a_commit"),
    r"lgp run pool12 --trackers": ("packages and keys", "tests/integration/test_tracking.py::test_wandb"),
    r"pip wheel": (
        "a minute",
        "tests/integration/test_wheel.py::test_the_pages_commands",
    ),
    r"pip install": ("changes what is installed", "tests/unit/test_docs.py::test_every_command_is_one"),
    r"scripts/audit": ("asks PyPI", "tests/unit/test_lock.py::test_the_bill_of_materials_is_the_lock"),
    r"scripts/bench_engines": (
        "minutes of clocks",
        "tests/distributed/test_bench_engine.py::test_other_engines_send_every_gradient",
    ),
    r"scripts/bench_gpu": ("a GPU", "tests/unit/test_bench_ops.py::test_op_prints_an_object_for_each_way"),
    r"scripts/bench_sessions": (
        "minutes of clocks",
        "tests/numerics/test_export_formats.py::test_graphs_share_the_weights_of_a_folder",
    ),
    r"scripts/bench_scaling": (
        "minutes of clocks",
        "tests/unit/test_bench_compare.py::test_scaling_judges_what_was_held_out_and_predicts",
    ),
    r"scripts/bench_throughput": (
        "minutes of clocks",
        "tests/distributed/test_bench_train.py::test_peers_draw_on_every_rank_and_bare_is_for_one",
    ),
    r"scripts/docs": ("fetches its builder", "tests/unit/test_docs.py::test_every_page_has_its_place_in_the_site"),
    r"scripts/lock": ("asks PyPI", "tests/unit/test_lock.py::test_what_the_project_asks_for_is_locked"),
    r"scripts/prove_exact": ("minutes", "tests/distributed/test_exact.py::test_ranks_equal_one_process"),
    r"scripts/run_pool12": (
        "all stages, launched one after the other",
        "tests/distributed/test_stages.py::test_engines_make_the_same_weights",
    ),
    r"scripts/same_numbers": ("minutes", "tests/distributed/test_stages.py::test_engines_make_the_same_weights"),
    r"scripts/soak": ("minutes", "tests/distributed/test_soak.py::test_a_process_is_seen_as_it_is"),
    r"scripts/test": ("runs this", "tests/unit/test_docs.py::test_every_command_is_one"),
    r"scripts/torture": ("minutes", "tests/distributed/test_torture.py::test_a_minute_of_faults"),
    r"scripts/try_slurm": ("root, and Slurm", "tests/distributed/test_preemption.py::test_batch_script_in_an_array"),
}
"""What a command begins with that is not run here -> why, and the test of the nearest thing."""


def copy(source: str, target: str) -> None:
    shutil.copytree(source, target)


def bare_shards() -> None:
    copy("shards/imagenet", "folder")
    for path in (*Path("folder").glob("*.json"), *Path("folder").glob("*.npz")):
        path.unlink()


def photographs() -> None:
    Path("photographs").mkdir()
    photograph(0, 1000, 800).save("photographs/one.png")


def own_ancestry() -> None:
    """One whose head has the classes of `shards/own`."""
    config = tiny()
    config = replace(config, data=replace(config.data, num_classes=CLASSES))
    save_tensors(Path("some.file"), ancestry_vit(config).state_dict())


def reweighted() -> None:
    """The page's command before: stage finetune made of the weights."""
    made = small(("finetune", "tiny", "--finetune.weights", "weights.safetensors", "--force"))
    assert call_main(made.split()) == 0


def measured() -> None:
    """Steps on one rank, and as many that stand for two."""
    assert call_main(small(("bench", "engine", "tiny", "--out", "engines.json")).split()) == 0
    rows = json.loads(Path("engines.json").read_text())
    Path("engines.json").write_text(json.dumps(rows + [{**row, "ranks": 2, "ms": 1.5 * row["ms"]} for row in rows]))


def all_paths() -> None:
    command = ("export", "runs/tiny", "--all", "--out", "folder", "--images", "2", "--formats", "onnx")
    assert call_main(command) == 0


def latency_table() -> None:
    keys = [row["key"] for row in json.loads(Path("runs/tiny/evaluate/paths.json").read_text())]
    Path("latencies.csv").write_text("".join(f"{line}\n" for line in ("key,latency_ms", *(f"{key},1" for key in keys))))


def costs() -> None:
    assert call_main(small(("bench", "paths", "tiny", "--out", "some.file")).split()) == 0


def snnet_results() -> None:
    Path("some.file").write_text(json.dumps({"cfg_id": 0, "flops": 1258411200, "params": 5717416, "acc1": 70.56}))


def image_file() -> None:
    Path("some.jpg").write_bytes(image(0))


NEEDS: dict[str, Callable[[], object]] = {
    r"shards sample": lambda: shutil.rmtree("shards/sample"),
    r"show my_recipes\.py": lambda: call_main(("new", "my_recipes.py", "--from", "pool12")),
    r"predict folder": lambda: (copy("runs/tiny/export", "folder"), image_file()),
    r"shards build fashion-mnist": lambda: idx_files(Path("folder"), 20, 10),
    r"shards build imagefolder": lambda: LAYOUTS["imagefolder"](Path("folder")),
    r"shards build imagenet": lambda: LAYOUTS["imagenet"](Path("folder")),
    r"shards build kaggle": lambda: LAYOUTS["kaggle"](Path("folder")),
    r"shards build parquet": lambda: LAYOUTS["parquet"](Path("folder")),
    r"shards index folder": bare_shards,
    r"shards verify folder": lambda: copy("shards/imagenet", "folder"),
    r"bench latency folder": all_paths,
    r"descend .*--latency-table": latency_table,
    r"finetune-descendant folder": lambda: copy("runs/tiny/export", "folder"),
    r"bench data": photographs,
    r"bench scaling": measured,
    r"launch check some\.file": lambda: shutil.copy("launch_configs/cpu_2.yaml", "some.file"),
    r".*--ancestry\.weights some\.file": own_ancestry,
    r".*--finetune\.costs some\.file": costs,
    r"evaluate .*--finetune\.weights": reweighted,
    r"report ": lambda: copy("runs/tiny", "runs/other"),
    r"report .*--snnet": snnet_results,
}
"""What a command begins with -> what it finds in the current folder in addition to what `world` has."""

SAYS = {
    r"show my_recipes\.py": "Nothing differs from pool12.",
    r"predict folder": "some.jpg",
    r"shards verify": "every shard and image is whole",
    r"paths pool12": "18 paths, 5 stitch layers, 47.83 M stored",
    r"launch check": ": ok",
    r"checkpoint verify": ": whole, ",
    r"checkpoint show": "finetune",
    r"shards (build|reshard|show)": "train: ",
    r"descend runs/": "To write it: lgp export runs/",
    r"specialise runs/": "% trained alone",
    r"bench sampler": "balanced",
    r".* --help": "usage: lgp ",
}
"""What a command begins with -> what it prints."""

MAKES = {
    rf"run {RECIPE}": ("{run}/report.html", "{run}/paths.csv", "{run}/pareto.png", "{run}/export/model.safetensors"),
    **{rf"{stage} {RECIPE}": (f"{{run}}/{stage}/artifact.json",) for stage in STAGES},
    r"new flowers\.py": ("flowers.py",),
    r"new my_recipes\.py": ("my_recipes.py",),
    r"new some\.py": ("some.py",),
    r"shards sample": ("shards/sample/manifest.json",),
    r"finetune-descendant": ("{run}/export/config.json", "{run}/export/model.safetensors"),
    r"descend .*--plot": ("{run}/descend.png", "{run}/descend.svg"),
    r"report": ("{run}/compare.md", "{run}/compare.png", "{run}/compare.svg"),
    r"shards index folder": ("folder/manifest.json", "folder/_info.json", "folder/index-train.npz"),
    r"shards index shards/sample --out folder": ("folder/manifest.json", "folder/_info.json", "folder/index-train.npz"),
    r"shards index shards/sample$": ("shards/sample/manifest.json", "shards/sample/_info.json"),
}
"""What a command begins with -> files that it makes, in addition to those that its options name."""


WHAT_TO_ADD = (
    "Every command of a page runs here: add to NEEDS what it finds in its folder, to SMALLER options (or to LIKE a "
    "recipe) that make it take a second, to MAKES and SAYS what comes out; or, where it cannot run, to ELSEWHERE the "
    "reason and the nearest test."
)


def entries(command: Command) -> list[str]:
    """Keys of ELSEWHERE that a command has."""
    return [pattern for pattern in ELSEWHERE if re.match(rf"{pattern}( |$)", " ".join(command.words))]


def arguments(command: Command) -> tuple[str, ...]:
    """What `lgp` gets, whatever launches it; empty where nothing here can run it."""
    words = command.words
    if entries(command):
        return ()
    if words[0] == "scripts/quickstart":
        return ("run", "tiny", *words[1:])
    if words[0] == "sbatch":
        return words[words.index("launch_configs/slurm/train.sbatch") + 1 :]
    return words[1 if words[0] == "lgp" else (words.index("lgp_dist") + 1 if "lgp_dist" in words else len(words)) :]


def possible(words: tuple[str, ...]) -> str:
    """The command on a recipe and a checkpoint that `world` has."""
    reads = words[0] in ("run", "bench", *STAGES) and words[1] not in ("sampler", "scaling") and "--help" not in words
    text = " ".join(LIKE.get(word, word) if reads else word for word in words)
    return re.sub(r"step-\d{8}", "step-00000001", text)


def small(words: tuple[str, ...]) -> str:
    """The command with the options that make it small."""
    text = possible(words)
    return " ".join([text, *(options for pattern, options in SMALLER.items() if re.match(pattern, text))])


def documented() -> list[Command]:
    found = [command for page in PAGES for command in commands(page, (ROOT / page).read_text())]
    return [command for command in found if not command.named]


NAMES_A_RESULT = ("--out", "--sheet", "--run-dir")

CASES = {small(words): command for command in reversed(documented()) if (words := arguments(command))}
"""Every command that runs here, in its small form -> the first page's that is like it."""


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1] if option in words else ""


def directory(words: list[str]) -> str:
    """The run directory, or the folder that --out names."""
    named = value(words, "--run-dir") or value(words, "--out")
    unnamed = {"finetune-descendant": "runs/downstream", "report": "runs/report"}.get(words[0])
    return named or unnamed or (f"runs/{words[1]}" if words[1] in RECIPES else words[1])


def results(words: list[str]) -> dict[Path, int]:
    """Everything that the command must write, and when each was written; 0 where it is not there."""
    text = " ".join(words)
    files = [file for pattern, files in MAKES.items() if re.match(pattern, text) for file in files]
    files = [file.format(run=directory(words)) for file in files if "--help" not in words]
    named = [value(words, option) for option in NAMES_A_RESULT if option in words]
    return {path: path.stat().st_mtime_ns if path.exists() else 0 for path in map(Path, (*named, *files))}


def clear(words: list[str]) -> None:
    """Takes away what the command makes: what its options name, the stage and all later ones."""
    targets = [value(words, option) for option in NAMES_A_RESULT if option in words]
    if words[0] == "run":
        targets.append(directory(words))
    elif words[0] in STAGES and words[1] in RECIPES and "--force" not in words:
        behind = STAGES[STAGES.index(words[0]) :]
        targets += [f"{directory(words)}/{place}" for stage in behind for place in (stage, f"checkpoints/{stage}")]
    for target in map(Path, targets):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A person's folders, but small: shards, launch files, benchmarks, a finished run. Not to be changed."""
    folder = tmp_path_factory.mktemp("documented") / "world"
    shutil.copytree(ROOT / "launch_configs", folder / "launch_configs")
    (folder / "benchmarks").mkdir()
    idx_files(folder / "idx", 128, 32)
    sample, options = folder / "shards" / "sample", BuildOptions(workers=1)
    build_shards("fashion-mnist", folder / "idx", sample, options, quiet)
    for name in ("fashion_mnist", "imagenet"):
        shutil.copytree(sample, sample.with_name(name))
    for label in range(CLASSES):
        for split, count in (("train", 3), ("test", 1)):
            (folder / "own" / split / f"{label:02d}").mkdir(parents=True)
            for number in range(count):
                (folder / "own" / split / f"{label:02d}" / f"{number}.jpg").write_bytes(image(label))
    build_shards("imagefolder", folder / "own", sample.with_name("own"), options, quiet)
    write_ancestry(sample / "ancestry.safetensors")
    before = Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        assert call_main(small(("run", "tiny", "--checkpoint.every=1")).split()) == 0
        made = "runs/tiny/checkpoints/finetune/step-00000001"
        assert call_main(("checkpoint", "consolidate", made, "--out", "weights.safetensors")) == 0
        os.symlink("tiny", "runs/pool12")
    finally:
        os.chdir(before)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def run_documented(
    world: Path, tmp_path: Path, lgp: Lgp, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, Command], None]]:
    """Runs a small command in a copy of `world`; its results must be there, and its page's promise kept."""
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setattr(
        bench_data, "_run", loader_module.measure
    )  # a process for each loader takes 10 s to import torch
    monkeypatch.setattr(bench_step, "PRECISIONS", ("fp32",))  # bf16 is slow on CPUs

    def call(text: str, command: Command) -> None:
        words = text.split()
        for need in (need for pattern, need in NEEDS.items() if re.match(pattern, text)):
            need()
        clear(words)
        before = results(words)
        done = lgp(*words)
        said = f"`{command.text}` of {command.page}, run as `lgp {text}`, ended with {done.status}: {done.err[-2000:]}"
        assert done.status in ((0, 1) if words[0] == "doctor" else (0,)), f"{said}\n{WHAT_TO_ADD}"
        assert "Traceback" not in done.err, said
        for sentence in (sentence for pattern, sentence in SAYS.items() if re.match(pattern, text)):
            assert sentence in done.out, f"{said}\nwithout {sentence!r}: {done.out}"
        if "--json" in words:
            assert json.loads(done.out), said
        after = results(words)
        missing = [str(path) for path in after if after[path] == before[path]]
        assert not missing, f"{said}\nand did not write {missing}"

    yield call
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "world")


@pytest.mark.parametrize("text", CASES, ids=[" ".join(arguments(command)) for command in CASES.values()])
def test_command_runs(text: str, run_documented: Callable[[str, Command], None]) -> None:
    run_documented(text, CASES[text])


@pytest.mark.parametrize(
    "line",
    [
        "lgp shards index NEW_PLACE",
        "lgp launch check launch_configs/multinode.yaml",
    ],
)
def test_a_new_command_that_cannot_run_says_what_to_add(
    line: str, run_documented: Callable[[str, Command], None]
) -> None:
    (command,) = commands("docs/new.md", f"\n    {line}")
    with pytest.raises(AssertionError, match=re.escape(line)) as caught:
        run_documented(small(arguments(command)), command)
    assert "docs/new.md" in str(caught.value) and WHAT_TO_ADD in str(caught.value)


def left_out(found: list[Command]) -> list[str]:
    """Commands that neither run here nor have an entry of ELSEWHERE."""
    return [f"`{one.text}` of {one.page}" for one in found if not arguments(one) and not entries(one)]


def test_every_command_runs_here_or_elsewhere() -> None:
    nowhere = left_out(documented())
    assert not nowhere, f"nothing runs {nowhere}: {WHAT_TO_ADD}"
    assert left_out(commands("docs/new.md", "\n    scripts/test_more\n    scripts/test")) == [
        "`scripts/test_more` of docs/new.md"
    ]
    assert len(CASES) > 50


def test_no_entry_is_stale() -> None:
    """Every entry of every table has a command, and ELSEWHERE names tests that are there."""
    stale = ELSEWHERE.keys() - {pattern for command in documented() for pattern in entries(command)}
    texts = [possible(arguments(command)) for command in CASES.values()]
    for table in (NEEDS, SMALLER, SAYS):
        stale |= {pattern for pattern in table if not any(re.match(pattern, text) for text in texts)}
    assert not stale, f"no page has a command for {stale}: take it out"
    for why, test in ELSEWHERE.values():
        file, name = test.split("::")
        assert why and f"\ndef {name}(" in (ROOT / file).read_text(), f"ELSEWHERE names {test}, which is no test"
