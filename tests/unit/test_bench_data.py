"""`lgp bench data`: photographs, objects, shares, and what cannot be asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from data_helpers import photograph
from PIL import Image
from run_helpers import Lgp, has

from lgp_dist.bench.common import interval, spread
from lgp_dist.bench.loaders import data as bench
from lgp_dist.bench.loaders import loaders as loader_module
from lgp_dist.bench.loaders.photos import VARIANTS, make_photographs
from lgp_dist.data.shards.verify import verify_shards


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs, one that is too small and a file that is no image."""
    folder = tmp_path_factory.mktemp("sources")
    for seed in range(2):
        photograph(seed, 1200, 900).save(folder / f"{seed}.png")
    photograph(2, 300, 200).save(folder / "small.jpg")
    (folder / "none.jpg").write_bytes(b"none")
    return folder


@pytest.fixture(scope="module")
def photographs(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "photos"
    make_photographs([sources], folder, 20, 2)
    return folder


@pytest.mark.slow
def test_photographs_are_whole_and_always_the_same(sources: Path, photographs: Path, tmp_path: Path) -> None:
    make_photographs([sources], tmp_path / "again", 20, 2)
    for variant in VARIANTS:
        assert verify_shards(photographs / variant) == []
        names = sorted(path.name for path in (photographs / variant).iterdir())
        assert names == sorted(path.name for path in (tmp_path / "again" / variant).iterdir())
        for name in names:
            assert (photographs / variant / name).read_bytes() == (tmp_path / "again" / variant / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.slow
def test_photographs_are_read_by_webdataset(photographs: Path) -> None:
    """Short sides and labels; both variants show the same part of the same photograph."""
    read = []
    for variant in VARIANTS:
        shards = [str(path) for path in sorted((photographs / variant).glob("*.tar"))]
        pipeline = wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls")
        read.append(sorted(pipeline, key=lambda sample: sample[0]))
    assert len(read[0]) == len(read[1]) == 20
    for (key, full, label), (other, small, same) in zip(*read, strict=True):
        assert (key, label) == (other, same) and min(small.size) == min(256, *full.size)
        left, right = (np.asarray(image.resize((32, 32), Image.BOX), dtype=float) for image in (full, small))
        assert abs(left - right).mean() < 4


@pytest.mark.slow
def test_a_process_of_its_own(photographs: Path) -> None:
    """What a child prints; and its last words where it fails."""
    found = bench._run("lgp", photographs / "s256", 1, 8)
    assert found["images"] == 20 and found["cpu_s"] > 0


def test_objects(lgp: Lgp, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields and ratio; measured in this process, to be quick."""
    monkeypatch.setattr(bench, "_run", loader_module.measure)
    loaders = ("webdataset", "lgp")
    asked = ("--loaders", ",".join(loaders), "--repeats", "1", "--batch", "8", "--json")
    rows = json.loads(lgp("bench", "data", "--folder", photographs, *asked).out)
    assert [(row["data"], row["loader"]) for row in rows] == [
        (variant, loader) for variant in VARIANTS for loader in loaders
    ]
    for row in rows:
        base = next(r for r in rows if (r["data"], r["loader"]) == (row["data"], "webdataset"))
        ratio = row["images_per_cpu_second"] / base["images_per_cpu_second"]
        assert row["ratio"] == pytest.approx(ratio, rel=0.02)
        assert row["spread"] == 0 and row["images"] == 20 and row["commit"] and row["machine"]["cores"]


@pytest.mark.parametrize("loader", ["webdataset", "timm", "lgp"])
def test_every_loader_reads_every_image(photographs: Path, loader: str) -> None:
    """timm's reader rounds up to whole batches."""
    found = loader_module.measure(loader, photographs / "s256", 1, 10)
    assert found["images"] == 20 and found["cpu_s"] > 0 < found["wall_s"]


def test_threads_do_not_change_what_is_read(photographs: Path) -> None:
    batches = [images.clone() for images, _ in loader_module.lgp(photographs / "full", 2, 8)]
    threadless = [images.clone() for images, _ in loader_module.lgp(photographs / "full", 0, 8)]
    assert all(bool((a == b).all()) for a, b in zip(batches, threadless, strict=True))


def test_interval_of_the_median() -> None:
    """Its ranks are those of the printed tables; it covers the median of skewed draws as often as it says."""
    for count, low, high in (
        (1, 1, 1),
        (5, 1, 5),
        (6, 1, 6),
        (9, 2, 8),
        (10, 2, 9),
        (15, 4, 12),
        (20, 6, 15),
        (50, 18, 33),
    ):
        assert interval([float(number) for number in range(count, 0, -1)]) == (low, high)
    draws = np.random.default_rng(0).exponential(size=(4000, 20))
    covered = np.mean([low <= np.log(2) <= high for low, high in map(interval, draws.tolist())])
    assert 0.95 <= covered <= 0.97


def test_spread() -> None:
    assert spread([2.0, 1.0, 4.0]) == 1.5 and spread([3.0]) == 0.0


def test_loaders_are_those_that_can_be_asked() -> None:
    assert list(bench.NEEDS) == list(loader_module.LOADERS)


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["--loaders=ffcv"], ["--loaders", "'ffcv'", "webdataset"]),
        (["--repeats=0"], ["--repeats", "0"]),
        (["--threads=0"], ["--threads", "0"]),
        (["--batch=-1"], ["--batch", "-1"]),
        (["--photos=nothing"], ["--photos nothing", "no photograph"]),
        ([], ["--folder nowhere", "--photos"]),
    ],
)
def test_what_cannot_be(
    lgp: Lgp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], pieces: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    has(lgp("bench", "data", "--folder", "nowhere", *arguments).sentence, *pieces)
    assert not list(tmp_path.iterdir())


def test_folder_that_exists_is_not_overwritten(lgp: Lgp, sources: Path, tmp_path: Path) -> None:
    result = lgp("bench", "data", "--folder", tmp_path, "--photos", sources)
    has(result.sentence, str(tmp_path), "exists already", "--photos")
