"""docs/own_data.md on photographs in folders, and docs/api.md on a finished run: what the pages say, word for word."""

import importlib.util
import inspect
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import photograph
from docs_helpers import ROOT, commands
from run_helpers import SMALL, Lgp, has
from safetensors.torch import load_file
from torch import nn

from lgp_dist import api
from lgp_dist.config.own_recipe import OWN
from lgp_dist.files import LOCK, locked
from lgp_dist.recipes import recipe_of

CLASSES = ("daisy", "rose", "tulip", "violet")
SMALLER = [
    option for option in SMALL[1:] if not option.startswith(("--data", "--ancestry", "--run-dir", "--model", "--pool"))
] + ["--ancestry.train.max-steps=2", "--ancestry.train.batch-size=8", "--pool.samples=16", "--engine.device=cpu"]
"""What makes the page's run take seconds; models, images and classes are those of its file."""


def write_photographs(folder: Path) -> None:
    for label, name in enumerate(CLASSES):
        for split, count in (("train", 6), ("val", 3)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture = photograph(100 * label + 10 * count + number, 96, 72 + number)
                picture.save(folder / split / name / f"{number}.jpg")


@pytest.mark.slow
def test_the_page_leads_from_photographs_to_a_prediction(
    tmp_path: Path, lgp: Lgp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The five commands in the page's order; between the second and the third the page's lines are changed."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/own_data.md").read_text()
    first = [command for command in commands("docs/own_data.md", page) if not command.named][:5]
    build, new, run, descend, predict = [list(command.words[1:]) for command in first]
    write_photographs(Path("folder"))
    photograph(7, 300, 200).save("image.jpg")

    assert lgp(*build, "--workers", "1").status == 0
    assert lgp(*new).status == 0
    text = Path("flowers.py").read_text()
    changes = re.findall(r"^\| `(\w+=.+?)` \| `(\w+=.+?)` \|$", page, re.MULTILINE)
    assert len(changes) == 5 and all(text.count(before) == 1 for before, _ in changes)
    for before, after in changes:
        text = text.replace(before, after)
    Path("flowers.py").write_text(text)
    config = recipe_of("flowers.py:flowers")
    assert config.data.num_classes == len(CLASSES) and config.data.root == "shards/own"
    assert (config.data.train_split, config.data.val_split) == ("train", "validation")
    assert config.ancestry.source == "train" and config.data.channels == 3 and config.data.image_size == 64

    done = lgp(*run, *SMALLER)
    assert done.status == 0, done.err
    assert Path("runs/flowers/report.html").exists()
    assert lgp(*descend, "--device", "cpu").status == 0
    table = lgp(*predict).out.splitlines()
    assert table[0].split() == ["image.jpg", "%"]
    assert sorted(line.split()[0] for line in table[1:]) == list(CLASSES)
    assert sum(float(line.split()[1]) for line in table[1:]) == pytest.approx(100, abs=0.05)
    OWN.clear()


def test_a_new_recipe_for_other_classes(tmp_path: Path, lgp: Lgp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher from the hub gets a new head; shards without a second split are refused, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    write_photographs(Path("folder"))
    assert lgp("shards", "build", "imagefolder", "--source", "folder", "--out", "own", "--workers", "1").status == 0
    assert lgp("new", "flowers.py", "--from", "pool12_plus", "--data", "own").status == 0
    config = recipe_of("flowers.py:flowers")
    assert (config.ancestry.source, config.ancestry.head, config.data.num_classes) == ("hub", "fit", len(CLASSES))
    shutil.rmtree("folder/val")
    words = ("shards", "build", "imagefolder", "--source", "folder/train", "--out", "one", "--workers", "1")
    assert lgp(*words).status == 0
    has(lgp("new", "other.py", "--data", "one").sentence, "The manifest of one has no second split")
    assert not Path("other.py").exists()
    OWN.clear()


NAMES = ["Batch", "EngineConfig", "OwnTask", "Run", "StepContext", "TrainConfig", "UserError", "open_run", "train"]
METHODS = {
    "paths": "(self)",
    "frame": "(self)",
    "best": "(self, max_params=0, max_flops=0, max_latency_ms=0.0, device='cpu')",
    "pool": "(self, device='cpu')",
    "descendant": "(self, key)",
    "export": "(self, key, out, formats=(), images=64)",
}


def signature(function: object) -> str:
    """Names and defaults of a function's arguments."""
    found = inspect.signature(function)  # type: ignore[arg-type]
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def test_the_api_is_stable() -> None:
    """A name or an argument that goes or changes breaks people's scripts: this list may only grow."""
    assert sorted(api.__all__) == NAMES and all(hasattr(api, name) for name in NAMES)
    public = {name: value for name, value in vars(api.Run).items() if not name.startswith("_") and callable(value)}
    assert {name: signature(value) for name, value in public.items()} == METHODS
    assert signature(api.open_run) == "(folder)"
    assert signature(api.train).startswith("(task, batches, steps, out, config=")
    assert signature(api.OwnTask).startswith("(module, loss, order=(), skippable=(), uses=")
    page = (ROOT / "docs/api.md").read_text()
    assert all(f"`{name}" in page for name in NAMES if name != "Run") and all(
        f"`Run.{name}(" in page for name in METHODS
    )


@pytest.mark.slow
def test_the_pages_examples_run(
    finished_place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in their order, in one session; what they make is compared with the run's own files."""
    Path("runs").mkdir()
    Path("run").rename("runs/tiny")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    session: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), session)
    assert len(blocks) == 6
    rows = json.loads(Path("runs/tiny/evaluate/paths.json").read_text())
    shown = capsys.readouterr().out.splitlines()
    assert shown[: len(rows)] == [f"{row['key']} {row['params']} {row['flops']} {row['top1']}" for row in rows]
    fitting = [row for row in rows if row["params"] <= 400_000]
    assert session["best"] == sorted(fitting, key=lambda row: (-row["top1"], row["flops"]))[0]
    weights = load_file("runs/tiny/finetune/pool.safetensors")
    pool = session["pool"]
    assert isinstance(pool, nn.Module) and not pool.training
    assert {name: value.sum().item() for name, value in pool.state_dict().items()} == {
        name: value.sum().item() for name, value in weights.items()
    }
    model = session["model"]
    exported = load_file("chosen/model.safetensors")
    assert isinstance(model, nn.Module)
    assert all(torch.equal(value, exported[name]) for name, value in model.state_dict().items())
    assert [json.loads(line)["step"] for line in Path("own/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_tutorial_runs(finished_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a whole; what it says agrees with the run's own files."""
    Path("runs").mkdir()
    Path("run").rename("runs/tiny")
    Path("shards/sample").symlink_to(".")
    runpy.run_path(str(ROOT / "docs/tutorial.py"))
    rows = json.loads(Path("runs/tiny/evaluate/paths.json").read_text())
    best = max((row for row in rows if row["params"] <= 400_000), key=lambda row: (row["top1"], -row["flops"]))
    said = capsys.readouterr().out
    assert all(row["key"] in said for row in rows) and f"{best['key']} is the best of at most" in said
    assert "images.\n" in said and Path("chosen/model.safetensors").is_file()
    assert {file.name for file in Path("tutorial").iterdir()} == {"paths.png", "images.png", "cascade.png"}


@pytest.mark.slow
def test_what_the_api_says_of_wrong_calls(finished_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = api.open_run("run")
    wrong = [
        (lambda: api.open_run("shards"), "shards holds no evaluated run"),
        (lambda: run.best(max_params="1k"), "No path fits the budget"),
        (lambda: run.best(max_params="many"), "'many' is no amount"),
        (lambda: run.descendant("r0.0-9"), "The pool has no path 'r0.0-9'"),
        (lambda: run.pool()(torch.zeros(1, 1, 28, 28), "r9"), "The pool has no path 'r9'"),
        (lambda: run.export("r0.0-5", "run"), "run is there already"),
        (lambda: run.export("r0.0-5", "new", formats="onnx"), "export.formats is ('o', 'n', 'n', 'x'), but must"),
        (lambda: run.best(max_flops=-1), "budget.max_flops"),
        (
            lambda: run.best(max_latency_ms=1, device="tpu"),
            "budget.device is 'tpu', but must be of type Literal['cpu', 'cuda']",
        ),
    ]
    for call, said in wrong:
        with pytest.raises(api.UserError, match=re.escape(said)):
            call()
    timed = run.best(max_latency_ms=1e6)
    assert timed["latency_ms"] > 0 and timed["top1"] == run.best()["top1"]
    if importlib.util.find_spec("pandas"):
        assert run.frame().to_dict("records") == run.paths()
    monkeypatch.setitem(sys.modules, "pandas", None)  # what an import finds where it is not installed
    with pytest.raises(api.UserError, match="pip install pandas"):
        run.frame()


def test_an_own_task_is_checked(tmp_path: Path) -> None:
    parts = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    for wrong, said in (
        ({"order": ("one", "too")}, "no submodule 'too': the nearest is two"),
        ({"skippable": ("one",)}, "skippable names 'one', which no submodule of order holds"),
        ({"order": ("one", "two", "one")}, "order names 'one' twice"),
        ({"order": ("one",)}, "Parameter two.weight is in no submodule of order"),
    ):
        with pytest.raises(api.UserError, match=said):
            api.OwnTask(parts, lambda module, batch, place: torch.zeros(()), **wrong)
    task = api.OwnTask(parts, lambda *given: torch.zeros(()), ("one", "two"), ("two",), lambda place: "to")
    with pytest.raises(api.UserError, match="uses returns 'o', which skippable does not name"):
        task.used(api.StepContext(0, 0, 0, 1))
    file = tmp_path / "file"
    file.write_text("")
    for steps, changed, said in (
        (0, {}, "steps is 0, but must be a whole number from 1 on"),
        (2.5, {}, "steps is 2.5"),
        (1, {"checkpoint_every": -2}, "checkpoint_every is -2"),
        (1, {"config": api.TrainConfig(optimizer="adam")}, "config.optimizer is 'adam', but must be of type Literal"),
        (1, {"config": api.TrainConfig(lr=-1.0)}, "config.lr is -1.0, but must be 0 or more"),
        (1, {"config": api.TrainConfig(accumulate=0)}, "config.accumulate is 0"),
        (1, {"engine": api.EngineConfig(device="tpu")}, "engine.device is 'tpu'"),
        (1, {}, "file cannot be written to"),
    ):
        with pytest.raises(api.UserError, match=re.escape(said)):
            api.train(task, lambda place: api.Batch(*[torch.zeros(1)] * 3), steps, file, **changed)


def own_network(out: Path, steps: int = 4, broken: int = -1, **changed: Any) -> dict[str, torch.Tensor]:
    """Weights of a small network with dropout after training with checkpoints. broken: the step whose batch raises."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3), *changed.pop("more", ()))

    def batches(place: api.StepContext) -> api.Batch:
        if place.step == broken:
            raise ConnectionError("broken")
        images = torch.randn(6, 4, generator=torch.Generator().manual_seed(place.step))
        return api.Batch(images, torch.arange(6) % 3, torch.ones(6))

    def loss(module: nn.Module, batch: api.Batch, place: api.StepContext) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch.images), batch.targets)

    engine = api.EngineConfig(precision="fp32", device="cpu", threads=1)
    task = api.OwnTask(network, loss)
    api.train(task, batches, steps, out, api.TrainConfig(warmup_epochs=0.0, **changed), engine, checkpoint_every=1)
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def test_an_own_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Dropout included; other settings, a running training and a network that no checkpoint holds are refused."""
    whole, out = own_network(tmp_path / "whole"), tmp_path / "out"
    with pytest.raises(ConnectionError):
        own_network(out, broken=3)
    assert (out / "checkpoints/step-00000002").is_dir()
    for changed, said in (
        ({"steps": 2}, "steps was 4, now 2"),
        ({"lr": 0.5}, "config.lr was 0.0005, now 0.5"),
        ({"more": [nn.BatchNorm1d(3)]}, "would lack 3.running_mean"),
    ):
        with pytest.raises(api.UserError, match=re.escape(said)):
            own_network(out, **changed)
    with locked(out / LOCK), pytest.raises(api.UserError, match="is being written by process"):
        own_network(out)
    resumed = own_network(out, broken=1)  # whose batch is not asked for
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
