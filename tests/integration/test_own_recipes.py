"""A run of a recipe in a person's own file, from its first start to a prediction, on one process and on two."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from exact_launch import command
from PIL import Image
from run_helpers import LIMIT_S, SMALL, Lgp, has, snapshot

import lgp_dist.timm_models  # noqa: F401
from lgp_dist.cli import COMMANDS, GROUPS
from lgp_dist.cli.parse import parse
from lgp_dist.config.flat import flatten
from lgp_dist.config.own_recipe import OWN
from lgp_dist.data.stream import evaluation_batches, open_split
from lgp_dist.recipes import tiny

pytestmark = pytest.mark.slow  # runs of whole stages

NAME = "own.py:mine"


def write_own(text: str = "") -> str:
    """own.py, whose recipe is `SMALL`: tiny with small settings."""
    small = parse(["run", *SMALL, "--run-dir="], COMMANDS, GROUPS).arguments
    flat = repr(json.dumps(flatten(small)))
    source = (
        "import json\nfrom lgp_dist.config.flat import unflatten\n"
        f"SETTINGS = {flat}\n\ndef mine():\n    return unflatten(json.loads(SETTINGS))\n{text}"
    )
    Path("own.py").write_text(source)
    return source


def test_a_run_of_an_own_recipe(place: Path, lgp: Lgp) -> None:
    source = write_own()
    done = lgp("run", NAME, "--seed", "5")
    assert done.status == 0, done.err
    has(done.err, "seed 5 (recipe 0)")
    assert "finetune.train.max_steps" not in done.err  # the recipe's own
    assert json.loads(Path("runs/mine/environment.json").read_text())["recipe_source"] == source
    assert json.loads(Path("runs/mine/config.json").read_text())["recipe"] == NAME
    has(lgp("run", NAME, "--seed", "5").err, "finetune: complete in runs/mine/finetune, skipped")
    has(lgp("distil", NAME, "--seed", "6").sentence, "made with other settings", "seed was 5, now 6")

    # What is done with the run later reads its files alone.
    OWN.clear()
    Path("own.py").write_text("raise SystemExit('imported')")
    assert lgp("descend", "runs/mine", "--device", "cpu", "--json").status == 0
    exported = lgp("export", "runs/mine", "--path", "r0.0-2+r1.2-5", "--out", "out", "--formats", "--images", "4")
    assert exported.status == 0, exported.err
    assert lgp("report", "runs/mine", "--out", "compared").status == 0
    predicts("out", lgp)
    predicts("runs/mine/export", lgp)
    assert "recipe_source" not in json.loads((place / "out" / "config.json").read_text())


def predicts(folder: str, lgp: Lgp) -> None:
    """Predictions equal those of timm's model on images from timm's transform, of any size and colour."""
    images = {}
    for number, (size, mode) in enumerate([((28, 28), "L"), ((61, 40), "RGB"), ((30, 90), "RGBA")]):
        torch.manual_seed(number)
        pixels = torch.randint(256, (*size[::-1], 4), dtype=torch.uint8).numpy()
        images[f"image{number}.png"] = Image.fromarray(pixels, "RGBA").convert(mode)
        images[f"image{number}.png"].save(f"image{number}.png")
    done = lgp("predict", folder, *images, "--json", "--top", "3")
    assert done.status == 0, done.err
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = [f"class {number}" for number in range(10)]  # the shards' manifest has none
    for name, found in json.loads(done.out).items():
        with torch.no_grad():
            expected = model(transform(images[name].convert("L"))[None]).softmax(-1)[0]
        values, places = expected.topk(3)
        assert [guess for guess, _ in found] == [names[place] for place in places]
        assert [value for _, value in found] == pytest.approx(values.tolist(), abs=2e-3)
    table = lgp("predict", folder, "image0.png").out.splitlines()
    assert table[0].split() == ["image0.png", "%"] and len(table) == 6
    before = snapshot(Path(folder))
    has(lgp("predict", folder, "image9.png").sentence, "There is no file image9.png")
    has(lgp("predict", folder, folder).sentence, f"There is no file {folder}")
    Path("text.png").write_text("no image")
    has(lgp("predict", folder, "text.png").sentence, "text.png cannot be decoded", "JPEG, PNG or WebP")
    has(lgp("predict", folder, "image0.png", "--top", "0").sentence, "--top is 0")
    has(lgp("predict", "shards", "image0.png").sentence, "shards/config.json does not describe an exported descendant")
    assert snapshot(Path(folder)) == before


def test_predictions_are_those_of_evaluation(finished_place: Path, lgp: Lgp) -> None:
    """On the shards' own images: the logits that stage evaluate counted."""
    config = replace(tiny(), data=replace(tiny().data, root="shards"))
    batch = next(iter(evaluation_batches(open_split(config.data, "test"), config.data, 4, 0, 1)))
    index = open_split(config.data, "test")
    names = []
    for sample in range(4):
        shard = index.root / index.shards[index.shard[sample]]
        names.append(f"{sample}.png")
        content = shard.read_bytes()[int(index.offset[sample]) :][: int(index.size[sample])]
        Path(names[-1]).write_bytes(content)
    model = timm.create_model("local-dir:run/export", pretrained=True).eval()
    with torch.no_grad():
        expected = model(batch.images).softmax(-1)
    found = json.loads(lgp("predict", "run/export", *names, "--top", "10", "--json").out)
    for name, row in zip(names, expected, strict=True):
        assert [value for _, value in found[name]] == pytest.approx(sorted(row.tolist(), reverse=True), rel=1e-6)
    weights = Path("run/export/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    has(lgp("predict", "run/export", *names).sentence, "run/export is damaged", "export it again")


def test_every_rank_of_a_launch_reads_it(place: Path) -> None:
    source = write_own()
    words = [*command(2, False), "-m", "lgp_dist", "ancestry", NAME, "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    record = json.loads(Path("runs/mine/ancestry/artifact.json").read_text())
    assert record["world"] == 2 and record["config"]["seed"] == 1
    assert json.loads(Path("runs/mine/environment.json").read_text())["recipe_source"] == source
