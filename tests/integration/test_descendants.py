"""What is done with a finished run: a path within a budget, a folder of any path, training on another data set."""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from run_helpers import SMALL, Lgp, has, overwrite, snapshot
from safetensors.torch import load_file

import lgp_dist.timm_models  # noqa: F401
from lgp_dist.data.shards.index import index_shards
from lgp_dist.export.modeling_descendant import load_pool
from lgp_dist.models.descendant import load_descendant
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.stitched import PathSpace

pytestmark = pytest.mark.slow  # runs of whole stages

TINY = PathSpace((32, 96), 6, image_size=28, patch_size=7, channels=1, num_classes=10)
LIMITS = ["--max-params", "0.5M", "--max-flops", "2G", "--max-latency-ms", "1e6", "--device", "cpu", "--batch", "1"]


def rows() -> list[dict]:
    return json.loads(Path("run/evaluate/paths.json").read_text())


def best_within(limit: float) -> dict:
    """By sorting, not by the package's own rule."""
    fitting = [row for row in rows() if row["params"] <= limit]
    return sorted(fitting, key=lambda row: (-row["top1"], row["flops"]))[0]


def path_logits(key: str, images: torch.Tensor) -> torch.Tensor:
    """A path of the run's pool."""
    pool = LearngenePool.empty(TINY, (1, 3))
    pool.load_state_dict(load_file("run/finetune/pool.safetensors"))
    with torch.no_grad():
        return pool.eval()(images, TINY.by_key(key))


def write_other_shards(root: Path, classes: int = 3) -> None:
    """A data set of grey noise whose brightness is the class."""
    root.mkdir()
    for split, count in (("train", 24), ("validation", 12)):
        with tarfile.open(root / f"other-{split}-0000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(count):
                draw = np.random.default_rng(number).integers(0, 60, (28, 28))
                picture = io.BytesIO()
                Image.fromarray((draw + 80 * (number % classes)).astype(np.uint8)).save(picture, "PNG")
                for extension, content in (("png", picture.getvalue()), ("cls", str(number % classes).encode())):
                    member = tarfile.TarInfo(f"sample{number:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    index_shards(root, progress=lambda line: None)


def test_descend_a_run(lgp: Lgp, finished_place: Path) -> None:
    """The best path within all limits, with what it weighs, costs, takes and scores; the run itself stays as it is."""
    before = snapshot(Path("run"))
    done = lgp("descend", "run", *LIMITS, "--plot")
    assert done.status == 0, done.err
    chosen = best_within(500e3)
    has(done.out, f"{chosen['key']}: top-1 {chosen['top1']:.2f} %", f"{chosen['params'] / 1e3:.2f} k parameters")
    has(done.out, "multiply-adds", " ms (median; ", "cpu, batch 1, fp32", "run/descend.png", "lgp export run --path")
    after = snapshot(Path("run"))
    assert after.keys() - before.keys() == {"descend.png", "descend.svg", "latency.json"} - before.keys()
    assert {name: after[name] for name in before if name != "latency.json"} == {
        name: value for name, value in before.items() if name != "latency.json"
    }
    assert Path("run/descend.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(lgp("descend", "run", *LIMITS, "--json").out)
    assert {name: again[name] for name in chosen} == chosen and again["latency_ms"] > 0
    assert snapshot(Path("run")) == after, "latencies come from latency.json"


def test_descend_says_what_cannot_be(lgp: Lgp, finished_place: Path) -> None:
    smallest = min(rows(), key=lambda row: row["params"])
    refusal = lgp("descend", "run", "--max-params", "0.01M").sentence
    has(refusal, f"nearest is {smallest['key']}", f"params {smallest['params']} over --max-params 10000")
    has(lgp("descend", "tyny").sentence, "tyny is neither a recipe nor the directory of a run")
    Path("empty").mkdir()
    has(lgp("descend", "empty").sentence, "empty holds no evaluated run", "lgp evaluate")
    has(lgp("descend", "run", "--max-flops=-1").sentence, "budget.max_flops is -1")
    has(lgp("descend", "run", "--max-params", "10Q").sentence, "--max-params is '10Q'", "k, M, G or T")
    overwrite(Path("run/config.json"), 5, b"#\x00")
    has(lgp("descend", "run").sentence, "run/config.json cannot be read", "put back")
    overwrite(Path("run/evaluate/paths.json"), 5, b"#")
    has(lgp("descend", "run").sentence, "paths.json is missing or damaged")


def test_the_stage_takes_the_same_limits(lgp: Lgp, finished_place: Path) -> None:
    budget = ("--budget.max-params=0.2M", "--budget.max-flops=1e12", "--budget.max-latency-ms=1e6", "--budget.batch=2")
    done = lgp("descend", *SMALL, *budget, "--force")
    assert done.status == 0, done.err
    chosen = json.loads(Path("run/descend/descendant.json").read_text())
    assert chosen["key"] == best_within(200e3)["key"] and chosen["latency_ms"] > 0
    record = json.loads(Path("run/descend/artifact.json").read_text())["config"]
    assert (record["budget.max_params"], record["budget.batch"]) == (200000.0, 2)
    measured = json.loads(Path("run/latency.json").read_text())["places"].values()
    assert [len(each["paths"]) for each in measured if each["place"]["batch"] == 2] == [len(rows())]
    refused = lgp("descend", *SMALL, *budget, "--force", "--budget.max-params=10Q").sentence
    has(refused, "--budget.max-params is '10Q'", "k, M, G or T")


@pytest.mark.parametrize("key", ["r0.0-3+r1.4-5", "r1.0-5"])
def test_export_a_path_of_a_run(lgp: Lgp, finished_place: Path, key: str) -> None:
    """Any path as a folder; run and artifacts stay as they are."""
    before = snapshot(Path("run"), ("latency.json",))
    done = lgp("export", "run", "--path", key, "--out", "out", "--images", "6", "--formats", "onnx")
    assert done.status == 0, done.err
    assert snapshot(Path("run"), ("latency.json",)) == before
    made = {"README.md", "config.json", "model.safetensors", "modeling_descendant.py", "model.onnx", "verify.json"}
    assert {path.name for path in Path("out").iterdir()} == made
    verdict = json.loads(Path("out/verify.json").read_text())
    assert verdict["formats"]["timm"]["largest_difference"] == 0 and set(verdict["formats"]) == {
        "timm",
        "torch",
        "onnx",
    }
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    loaded = timm.create_model("local-dir:out", pretrained=True).eval()
    config = json.loads(Path("out/config.json").read_text())
    with torch.no_grad():
        assert torch.equal(loaded(images), path_logits(key, images))
        own = load_descendant(config, load_file("out/model.safetensors"))
        assert torch.equal(own(images), path_logits(key, images))
    tuned = json.loads(Path("run/finetune/artifact.json").read_text())
    row = next(row for row in rows() if row["key"] == key)
    card = Path("out/README.md").read_text()
    has(
        card,
        tuned["id"],
        tuned["files"]["pool.safetensors"],
        f"{row['params']:,}",
        f"{row['top1']:.2f} %",
        " ms (median",
    )
    before = snapshot(Path("out"))
    has(lgp("export", "run", "--path", key, "--out", "out").sentence, "out is there already")
    assert snapshot(Path("out")) == before


def test_all_paths_of_a_run(lgp: Lgp, finished_place: Path) -> None:
    """One folder is 18 models, bit for bit, and the run stays as it is. Latencies that are measured on its graphs
    decide what a budget gives, for this run and for the folder."""
    before = snapshot(Path("run"), ("latency.json",))
    done = lgp("export", "run", "--all", "--out", "all", "--images", "2", "--formats", "onnx")
    assert done.status == 0, done.err
    has(done.out, "all: 18 paths", "modeling_descendant.py 0,", "KEY.onnx ")
    assert snapshot(Path("run"), ("latency.json",)) == before
    keys = [row["key"] for row in rows()]
    made = {"README.md", "model.safetensors", "modeling_descendant.py", "onnx_paths.py", "paths.json", "verify.json"}
    assert {path.name for path in Path("all").iterdir()} == made | {f"{key}.onnx" for key in keys}
    weights = Path("all/model.safetensors").stat().st_size
    pool = load_file("run/finetune/pool.safetensors")
    assert weights <= 1.05 * sum(4 * tensor.numel() for tensor in pool.values())
    plain, images = load_pool("all"), torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for key in keys:
            plain.select(key)
            assert torch.equal(plain(images), path_logits(key, images)), key
    row = plain.select(max_params=300e3)
    assert row["key"] == best_within(300e3)["key"] and row["latency_ms"] > 0
    measured = lgp("bench", "latency", "all", "--out", "phone.csv", "--json")
    assert measured.status == 0, measured.err
    table = {row["key"]: row["latency_ms"] for row in json.loads(measured.out)}
    assert list(table) == keys and min(table.values()) > 0
    limit = sorted(table.values())[8]
    kept = snapshot(Path("run"))
    choice = lgp("descend", "run", "--latency-table", "phone.csv", "--max-latency-ms", str(limit))
    fitting = [row for row in rows() if table[row["key"]] <= limit]
    chosen = sorted(fitting, key=lambda row: (-row["top1"], row["flops"]))[0]["key"]
    has(choice.out, f"{chosen}: top-1", f"takes   {table[chosen]:.3f} ms\n", "phone.csv")
    assert snapshot(Path("run")) == kept, "nothing is measured here"
    done = lgp("export", "run", "--all", "--out", "fast", "--images", "2", "--formats", "--latency-table", "phone.csv")
    assert done.status == 0, done.err
    assert load_pool("fast").select(max_latency_ms=limit)["key"] == chosen and not list(Path("fast").glob("*.onnx"))
    Path("phone.csv").write_text("key,latency_ms\nr0.0-5,3\n")
    has(lgp("descend", "run", "--latency-table", "phone.csv").sentence, "phone.csv lacks 17 of 18 paths")
    has(lgp("bench", "latency", "fast", "--out", "phone.csv").sentence, "fast has no paths.json with graphs")
    has(lgp("bench", "latency", "all", "--out", "phone.csv", "--batch", "0").sentence, "--batch is 0")
    overwrite(Path("run/finetune/pool.safetensors"), 5000, b"\x01\x02\x03\x04")
    has(lgp("export", "run", "--all", "--out", "out").sentence, "pool.safetensors is missing or damaged")
    assert not Path("out").exists() and not list(Path().glob(".*partial"))


def test_an_export_that_fails_leaves_nothing(lgp: Lgp, finished_place: Path) -> None:
    has(lgp("export", "run", "--path", "r0.0-9", "--out", "out").sentence, "r0.0-9", "lgp paths")
    has(lgp("export", "run", "--path", "r1.0-5", "--out", "out", "--formats", "int8").sentence, "int8 without onnx")
    overwrite(Path("run/finetune/pool.safetensors"), 5000, b"\x01\x02\x03\x04")
    has(lgp("export", "run", "--path", "r1.0-5", "--out", "out").sentence, "pool.safetensors is missing or damaged")
    assert not Path("out").exists() and not list(Path().glob(".*partial"))


def test_export_without_the_extra(lgp: Lgp, finished_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = lgp("export", "run", "--path", "r1.0-5", "--out", "out", "--images", "2", "--formats", "onnx", "int8")
    assert done.status == 0 and "pip install 'lgp_dist[onnx]'" in done.out, done.err
    assert not list(Path("out").glob("*.onnx")) and Path("out/model.safetensors").is_file()


@pytest.mark.parametrize("key", ["r0.0-3+r1.4-5", "r0.0-5"])
def test_finetune_on_another_data_set(lgp: Lgp, finished_place: Path, key: str) -> None:
    """Three classes in place of ten: learned, written as a folder of the same layout, and loaded again."""
    write_other_shards(Path("other"))
    assert lgp("export", "run", "--path", key, "--out", "out", "--images", "2", "--formats").status == 0
    options = "--num-classes 3 --train.epochs 30 --train.batch-size 8 --train.lr 2e-3 --train.warmup-epochs 1"
    engine = "--engine.precision fp32 --engine.threads 1 --engine.device cpu --threads 0 --export.formats"
    command = ("finetune-descendant", "out", "--data", "other", "--out", "down", *options.split(), *engine.split())
    before = snapshot(Path("out"))
    done = lgp(*command)
    assert done.status == 0, done.err
    assert snapshot(Path("out")) == before
    assert {path.name for path in Path("down/export").iterdir()} == {path.name for path in Path("out").iterdir()}
    config = json.loads(Path("down/export/config.json").read_text())
    measured = config["lgp"]["measured"]
    assert measured["key"] == key and config["num_classes"] == 3 and measured["top1"] >= 90, "brightness is easy"
    model = timm.create_model("local-dir:down/export", pretrained=True).eval()
    assert sum(tensor.numel() for tensor in model.parameters()) == measured["params"]
    space = PathSpace((32, 96), 6, image_size=28, patch_size=7, channels=1, num_classes=3)
    assert measured["flops"] == space.cost(space.by_key(key)).flops
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    own = load_descendant(config, load_file("down/export/model.safetensors"))
    with torch.no_grad():
        assert model(images).shape == (4, 3) and torch.equal(own(images), model(images))
    metrics = Path("down/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(90))
    outcome = json.loads(Path("down/outcome.json").read_text())
    assert (outcome["outcome"], outcome["stage"]) == ("complete", "downstream")
    has(lgp(*command).sentence, "down/export is there already")


def test_finetune_goes_on_from_its_checkpoint(lgp: Lgp, finished_place: Path) -> None:
    """Stopped between training and export, as if killed: the weights are those of one that was not."""
    write_other_shards(Path("other"))
    options = "--num-classes 3 --train.max-steps 6 --train.batch-size 8 --checkpoint.every 4 --export.formats"
    engine = "--engine.precision fp32 --engine.threads 1 --engine.device cpu --threads 0 --export.images 2"
    command = ("finetune-descendant", "run/export", "--data", "other", *options.split(), *engine.split())
    assert lgp(*command).status == 0
    whole = load_file("runs/downstream/export/model.safetensors")
    shutil.rmtree("runs/downstream/export")
    again = lgp(*command)
    assert again.status == 0 and "step 4" in again.err, again.err
    resumed = load_file("runs/downstream/export/model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    shutil.rmtree("runs/downstream/export")
    has(lgp(*command, "--train.lr", "0.5").sentence, "finetune.train.lr")


def test_finetune_refuses_what_it_cannot_read(lgp: Lgp, finished_place: Path) -> None:
    write_other_shards(Path("other"))
    command = ("finetune-descendant", "run/export", "--data", "other", "--out", "down", "--train.batch-size", "8")
    has(lgp(*command).sentence, "other", "no classes", "--num-classes")
    has(lgp(*command, "--num-classes", "2").sentence, "the label is 2", "0 .. 1")
    has(lgp(*command, "--num-classes", "3", "--train.batch-size", "400").sentence, "train.batch_size", "24")
    shutil.rmtree("run/export")
    has(lgp(*command).sentence, "run/export/config.json does not describe an exported descendant")
    assert not Path("down/export").exists()


def test_specialise_trains_one_path_alone(finished_place: Path, lgp: Lgp) -> None:
    """From the pool's weights, with a run directory of its own: what is off the path stays bit for bit, what is on it
    moves; accuracy before is the pool's; the path is exported like any other; a second start does nothing."""
    key = best_within(0.3e6)["key"]
    result = lgp("specialise", "run", "--max-params", "0.3M", "--epochs", "0.5", "--lr", "0.01")
    assert result.status == 0, result
    folder = Path("run/specialised") / key
    before, after = (json.loads((folder / "evaluate" / f"{name}.json").read_text()) for name in ("before", "paths"))
    assert [row["key"] for row in before + after] == [key, key]
    assert before[0]["top1"] == next(row["top1"] for row in rows() if row["key"] == key)
    assert f"{key}: top-1 {before[0]['top1']:.2f} % in the pool, {after[0]['top1']:.2f} % trained alone" in result.out
    old, new = (load_file(run / "finetune" / "pool.safetensors") for run in (Path("run"), folder))
    on_path = LearngenePool.empty(TINY, (1, 3)).modules_of(TINY.by_key(key))
    for name, tensor in old.items():
        moved = not torch.equal(tensor, new[name])
        assert moved == any(name.startswith(module + ".") for module in on_path), name
    for stage in ("distil", "pool"):
        assert (folder / stage / "artifact.json").samefile(Path("run") / stage / "artifact.json")
    assert lgp("export", folder, "--path", key, "--out", "alone", "--formats").status == 0
    config = json.loads(Path("alone/config.json").read_text())
    pool, images = LearngenePool.empty(TINY, (1, 3)).eval(), torch.randn(2, 1, 28, 28)
    pool.load_state_dict(new)
    with torch.no_grad():
        exported = load_descendant(config, load_file("alone/model.safetensors"))(images)
        assert torch.equal(exported, pool(images, TINY.by_key(key)))
    trained = snapshot(folder / "finetune")
    assert lgp("specialise", "run", "--path", key, "--epochs", "0.5", "--lr", "0.01").status == 0
    assert snapshot(folder / "finetune") == trained
    has(lgp("specialise", "run", "--path", "r0.0-9").sentence, "r0.0-9")
