"""What a person can get wrong: one sentence, status 2, and nothing that was complete has changed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_helpers import (
    LIMIT_S,
    SMALL,
    Lgp,
    break_images,
    has,
    index_of,
    outcome_of,
    overwrite,
    refused,
    shared_memory_goes,
    snapshot,
)

from lgp_dist.data.order import position_to_sample
from lgp_dist.data.shards.index import index_shards
from lgp_dist.files import LOCK, locked
from lgp_dist.run.metrics import read_metrics
from lgp_dist.run.run_status import RunStatus

ROOT = Path(__file__).parents[2]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def option(key: str, value: str) -> str:
    """The override of a key of the configuration."""
    return f"--{key.replace('_', '-')}={value}"


# The command line


def test_debug_shows_the_traceback(lgp: Lgp, place: Path) -> None:
    result = lgp("distil", *SMALL, "--debug")
    assert result.status == 2 and "Traceback" in result.err and "UserError" in result.err
    assert result.err.splitlines()[-1].startswith("lgp: ")


@pytest.mark.parametrize(
    ("key", "value", "pieces"),
    [
        ("trackers", "nonsense", ["'nonsense'", "tensorboard"]),
        ("tracker_args", "wandb.entity=me", ["wandb.entity", "tensorboard", "add wandb"]),
        ("tracker_args", "entity=me", ["'entity=me'", "TRACKER.KEY=VALUE"]),
        ("tracker_args", "tensorboard.comment", ["'tensorboard.comment'", "TRACKER.KEY=VALUE"]),
        ("export.path", "r0.0-9", ["'r0.0-9'", "lgp paths"]),
        ("model.rows.0.heads", "5", ["model.rows.0", "32", "5"]),
        ("model.rows.0.heads", "0", ["model.rows.0.heads", "0"]),
        ("ancestry.heads", "5", ["ancestry", "96", "5"]),
        ("ancestry.heads", "0", ["ancestry.", "0"]),
        ("model.patch_size", "0", ["patch_size", "0"]),
        ("data.image_size", "30", ["data.image_size", "30"]),
        ("model.depth", "1", ["model.depth", "1"]),
        ("data.channels", "2", ["data.channels", "2"]),
        ("data.num_classes", "0", ["num_classes", "0"]),
        ("data.threads", "-1", ["data.threads", "-1"]),
        ("faults.skip_steps", "-1", ["faults.skip_steps", "-1"]),
        ("faults.spike", "0.5", ["faults.spike", "0.5", "above 1"]),
        ("evaluate.batch_size", "0", ["evaluate.batch_size", "0"]),
        ("engine.threads", "-1", ["engine.threads", "-1"]),
        ("ancestry.model", "nonsense", ["ancestry.model", "'nonsense'"]),
        ("ancestry.model", "resnet18", ["ancestry.model", "resnet18"]),
    ],
)
def test_setting_that_cannot_be(lgp: Lgp, place: Path, key: str, value: str, pieces: list[str]) -> None:
    has(refused(lgp, "ancestry", option(key, value)), *pieces)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("distil", "distil.train.lr", "-1"),
        ("distil", "distil.train.lr", "nan"),
        ("distil", "distil.train.max_steps", "-1"),
        ("distil", "distil.train.epochs", "-1"),
        ("distil", "distil.train.clip_grad", "-1"),
        ("distil", "distil.train.label_smoothing", "2"),
        ("distil", "distil.alpha", "nan"),
        ("distil", "distil.tau", "0"),
        ("distil", "model.rows.0.drop_path", "2"),
        ("pool", "pool.samples", "0"),
        ("finetune", "finetune.tau", "0"),
        ("export", "export.images", "0"),
    ],
)
def test_number_out_of_range(lgp: Lgp, finished_place: Path, stage: str, key: str, value: str) -> None:
    """Each of these would train wrongly, or not at all; the sentence names the setting, not a consequence."""
    further = ["--pool.stitch-init=least_squares"] if stage == "pool" else []
    has(refused(lgp, stage, "--force", option(key, value), *further), key, value)


@pytest.mark.skipif(importlib.util.find_spec("aim") is not None, reason="the tracker is installed")
def test_tracker_that_is_not_installed(lgp: Lgp, finished_place: Path) -> None:
    has(refused(lgp, "distil", "--force", "--trackers", "aim"), "aim", "install")


# Data


@pytest.mark.parametrize("cut", [None, 20_000], ids=["missing", "truncated"])
@pytest.mark.parametrize(("stage", "split"), [("ancestry", "test-00"), ("distil", "train-0000")])
def test_shard_missing_or_truncated(lgp: Lgp, finished_place: Path, stage: str, split: str, cut: int | None) -> None:
    shard = Path(f"shards/fashion-mnist-{split}.tar")
    size = shard.stat().st_size
    if cut is None:
        shard.unlink()
    else:
        os.truncate(shard, cut)
    has(refused(lgp, stage, "--force"), str(shard), "missing" if cut is None else str(cut), str(size))


@pytest.mark.parametrize(("stage", "split"), [("ancestry", "test"), ("distil", "train")])
def test_image_that_does_not_decode(lgp: Lgp, finished_place: Path, stage: str, split: str) -> None:
    index, sample = index_of(split), int(position_to_sample(0, 0, 64)[3]) if split == "train" else 3
    break_images(split, [sample])
    sentence = refused(lgp, stage, "--force", begun=True)
    has(sentence, f"shards/{index.shards[0]}", str(index.keys[sample]), "decode", "lgp shards verify")


def test_bad_images_within_the_limit(lgp: Lgp, finished_place: Path) -> None:
    """The stage completes; log and metrics say what was replaced."""
    index, samples = index_of("train"), position_to_sample(0, 0, 64)[[1, 2, 9]].tolist()
    break_images("train", samples)
    result = lgp("distil", *SMALL, "--force", "--data.max-bad=3", "--data.threads=2")
    assert result.status == 0
    for sample in samples:
        has(
            Path("run/log.txt").read_text(),
            f"bad sample: {index.describe(sample)}: its bytes are not those that were indexed",
        )
    lines = list(read_metrics(Path("run/metrics.jsonl"), "distil"))
    assert [line["bad_samples"] for line in lines] == [2, 1]
    sentence = refused(lgp, "distil", "--force", "--data.max-bad=2", begun=True)
    has(sentence, "3 images of epoch 0 are bad", "data.max_bad allows 2", str(index.keys[samples[2]]))


def test_failed_training_keeps_the_metrics_of_the_complete_artifact(lgp: Lgp, finished_place: Path) -> None:
    before = Path("run/metrics.jsonl").read_text()
    break_images("train", list(range(64)))
    assert lgp("distil", *SMALL, "--force").status == 2
    assert Path("run/metrics.jsonl").read_text().startswith(before)


@pytest.mark.parametrize("label", ["10", "99"])
def test_label_outside_the_classes(lgp: Lgp, place: Path, label: str) -> None:
    shard, index = Path("shards/fashion-mnist-train-0000.tar"), index_of("train")
    content = shard.read_bytes()
    start = content.index(f"{index.keys[5]}.cls".encode())
    header = bytearray(content[start : start + 512])
    header[124:136] = b"%011o\0" % len(label)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    overwrite(shard, start, bytes(header) + label.encode())
    index_shards("shards", progress=lambda line: None)
    assert lgp("ancestry", *SMALL).status == 0
    has(refused(lgp, "distil"), str(shard), str(index.keys[5]), label, "0 .. 9", "data.num_classes")


@pytest.mark.parametrize(
    ("stage", "arguments", "pieces"),
    [
        ("distil", ["--distil.train.batch-size=100000"], ["batch_size", "100000", "64"]),
        ("distil", ["--distil.train.batch-size=0"], ["batch_size", "0"]),
        ("distil", ["--distil.train.accumulate=3"], ["batch_size", "8", "accumulate 3", "6 or 9"]),
        ("distil", ["--distil.train.accumulate=0"], ["accumulate", "0"]),
        ("finetune", ["--finetune.train.batch-size=100000"], ["batch_size", "100000", "64"]),
    ],
)
def test_batch_that_cannot_be_fed(
    lgp: Lgp, finished_place: Path, stage: str, arguments: list[str], pieces: list[str]
) -> None:
    has(refused(lgp, stage, "--force", *arguments), *pieces)


def test_shards_of_a_folder_with_problems(lgp: Lgp, place: Path) -> None:
    break_images("train", [3, 8])
    index_shards("shards", progress=lambda line: None)
    sentence = lgp("shards", "verify", "shards").sentence
    has(sentence, "shards/fashion-mnist-train-0000.tar", *(str(index_of("train").keys[sample]) for sample in (3, 8)))
    assert ".;" not in sentence
    has(lgp("shards", "index", "nothing").sentence, "nothing")
    has(lgp("shards", "build", "mnist", "--out", "new").sentence, "'mnist'")
    assert not Path("new").exists() and not Path("nothing").exists()


# The ancestry's file


def test_ancestry_of_another_shape(lgp: Lgp, place: Path) -> None:
    sentence = refused(lgp, "ancestry", "--ancestry.width=48")
    has(sentence, "ancestry.safetensors", "(96,)", "(48,)", "ancestry.model, width")


@pytest.mark.parametrize("weights", ["nothing.safetensors", "", "shards"], ids=["missing", "not named", "folder"])
def test_ancestry_file_that_is_none(lgp: Lgp, place: Path, weights: str) -> None:
    has(refused(lgp, "ancestry", "--ancestry.weights", weights), weights or "ancestry.weights", "safetensors file")


@pytest.mark.parametrize("keep", [0, 7, 500, 100_000])
def test_damaged_ancestry_file(lgp: Lgp, place: Path, keep: int) -> None:
    os.truncate("ancestry.safetensors", keep)
    has(refused(lgp, "ancestry"), "ancestry.safetensors", "not a whole safetensors file")


# The run directory


@pytest.mark.parametrize("run_dir", ["ancestry.safetensors/run", "ancestry.safetensors", "/proc/lgp/run"])
def test_run_directory_that_cannot_be(lgp: Lgp, place: Path, run_dir: str) -> None:
    before = snapshot(place)
    has(refused(lgp, "ancestry", "--run-dir", run_dir, run=run_dir), run_dir, "--run-dir")
    assert snapshot(place) == before


@pytest.fixture
def mount(finished_place: Path) -> Iterator[object]:
    """Mounts a memory file system on the folder `disk`, which holds the finished run's ancestry."""
    disk = finished_place / "disk"
    disk.mkdir()

    def on(*options: str) -> Path:
        if shutil.which("mount") is None:
            pytest.skip("there is no command mount")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        shutil.copytree("run/ancestry", disk / "ancestry")
        if options:
            subprocess.run(["mount", "-o", ",".join(("remount", *options)), disk], check=True)
        return disk

    yield on
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


def test_run_directory_read_only(lgp: Lgp, mount: object) -> None:
    mount("ro")
    has(refused(lgp, "distil", "--run-dir=disk", run="disk"), "disk", "Read-only", "--run-dir")


def test_run_directory_without_space(lgp: Lgp, mount: object) -> None:
    disk = mount()
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
    has(refused(lgp, "distil", "--run-dir=disk", run="disk"), "disk", "No space", "--run-dir")


def test_disk_that_fills_while_an_artifact_is_written(lgp: Lgp, mount: object) -> None:
    """8 MB hold the ancestry once, not twice."""
    disk = mount()
    before = snapshot(disk / "ancestry")
    sentence = lgp("ancestry", *SMALL, "--run-dir=disk", "--force").sentence
    assert snapshot(disk / "ancestry") == before
    assert not list(disk.glob(".*/artifact.json"))
    assert "skipped" in lgp("ancestry", *SMALL, "--run-dir=disk").err or not shutil.disk_usage(disk).free
    has(sentence, "disk", "No space", "--run-dir")


def test_failed_write_gives_its_space_back(lgp: Lgp, mount: object) -> None:
    """Otherwise the next command finds the disk full of a hidden folder."""
    disk = mount()
    free = shutil.disk_usage(disk).free
    assert lgp("ancestry", *SMALL, "--run-dir=disk", "--force").status == 2
    assert shutil.disk_usage(disk).free > free - 100_000


# Machine and launch


@needs_no_gpu
@pytest.mark.parametrize(
    "arguments",
    [SMALL, ("pool12", "--run-dir=run", "--data.root=shards", "--data.val-split=test")],
    ids=["override", "recipe"],
)
def test_gpu_recipe_without_gpu(lgp: Lgp, place: Path, arguments: tuple[str, ...]) -> None:
    sentence = lgp("run", *arguments, *(["--engine.device=cuda"] if arguments is SMALL else [])).sentence
    has(sentence, "engine.device cuda", "--engine.device cpu")
    assert not Path("run").exists()


@needs_no_gpu
def test_launch_that_names_gpus_without_gpu(lgp: Lgp, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    has(refused(lgp, "ancestry"), "GPUs 0", "launch_configs/cpu_2.yaml")
    assert not Path("run").exists()


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def test_backend_of_compile_that_does_not_exist(lgp: Lgp, place: Path) -> None:
    has(refused(lgp, "distil", "--engine.compile=fast"), "engine.compile", "'fast'", "inductor")


@pytest.mark.parametrize(
    ("environment", "pieces"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"},
            ["zero_stage 4", "0, 1, 2 and 3"],
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            ["ds.json", "cannot be read"],
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, ["use_fsdp=true"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["mixed_precision fp16", "engine.precision"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ["gradient_accumulation_steps=4"]),
    ],
)
def test_launch_that_is_not_supported(
    lgp: Lgp, place: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], pieces: list[str]
) -> None:
    for name, value in {"WORLD_SIZE": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    has(refused(lgp, "ancestry"), *pieces)
    assert not Path("run").exists()


def test_loss_that_becomes_infinite(lgp: Lgp, finished_place: Path) -> None:
    settings = ["--distil.train.lr=1e30", "--distil.train.warmup-epochs=0", "--distil.train.max-steps=4"]
    keys = index_of("train").keys[position_to_sample(0, 0, 64)[8:11]].tolist()
    sentence = refused(lgp, "distil", "--force", *settings, begun=True)
    has(sentence, "step 1 of stage distil", "rank 0", *keys, "distil.train.lr", "--faults.skip-steps")
    assert [line["step"] for line in read_metrics(Path("run/metrics.jsonl"), "distil")] == [0]
    assert outcome_of(Path("run")) == RunStatus("failed", "distil", 1, sentence)


# Two processes


def launched(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lgp ARGUMENTS` on two processes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "launch_configs/cpu_2.yaml"]
    return subprocess.run(
        [*launch, "-m", "lgp_dist", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.slow
def test_a_second_launch_is_refused_and_its_sentence_comes_last(place: Path) -> None:
    """Below the traceback of torch's launcher. Nothing is written next to the lock of the first."""
    with locked(Path("run") / LOCK):
        done = launched("ancestry", *SMALL)
        assert os.listdir("run") == [LOCK]
    last = [line for line in done.stderr.splitlines() if line.strip(" =-")][-1]
    assert done.returncode == 1 and "lgp: run is being written by process" in last, done.stderr
    has(last, str(os.getpid()), "--run-dir")


@pytest.mark.slow
def test_bad_images_of_all_ranks_count(finished_place: Path) -> None:
    """Two on each rank: neither alone has more than three, together they have; metrics count those of both."""
    break_images("train", position_to_sample(0, 0, 64)[[0, 1, 2, 11]].tolist())
    done = launched("distil", *SMALL, "--force", "--data.max-bad=4")
    assert done.returncode == 0, done.stderr
    lines = list(read_metrics(Path("run/metrics.jsonl"), "distil"))
    assert [line["bad_samples"] for line in lines] == [3, 1]
    done = launched("distil", *SMALL, "--force", "--data.max-bad=3")
    assert done.returncode != 0 and "4 images of epoch 0 are bad, and data.max_bad allows 3" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("positions", [range(64), range(1, 8, 2)], ids=["both ranks fail", "rank 1 fails"])
def test_launch_ends_when_an_image_is_broken(finished_place: Path, mark: str, positions: range) -> None:
    """With batch 8, the odd positions are those of rank 1 in the first step."""
    break_images("train", position_to_sample(0, 0, 64)[list(positions)].tolist())
    before = snapshot(Path("run/distil"))
    with shared_memory_goes():
        done = launched("distil", *SMALL, "--force", LGP_TEST_MARK=mark)
    assert done.returncode != 0
    sentences = [line for line in done.stderr.splitlines() if re.match(r"lgp( \(rank 1\))?: ", line)]
    assert len(sentences) == 1 and "cannot be decoded" in sentences[0] and sentences[0].endswith("."), done.stderr
    assert "lgp_dist/" not in done.stderr, "a traceback of this project"
    assert done.stdout.count("Setting accelerator to CPU") <= 1, "the launcher's own; the ranks are quiet"
    assert snapshot(Path("run/distil")) == before
