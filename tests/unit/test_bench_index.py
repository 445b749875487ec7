"""The measure of reading by index: complete figures, checked against what is in the shards."""

from pathlib import Path

import pytest
from shard_helpers import quiet, webdataset

from lgp_dist.bench.index import bench_index
from lgp_dist.data import compare
from lgp_dist.data.index import ShardIndex, index_shards
from lgp_dist.errors import UserError

SAMPLE = Path(__file__).parents[2] / "shards" / "sample"


def test_figures() -> None:
    found = bench_index(SAMPLE, "test", repeats=2)
    assert found["samples"] == 2000 and found["repeats"] == 2
    rates = found["samples_per_cpu_second"]
    assert set(rates) == set(found["spread"]) and all(rate > 0 for rate in rates.values())
    assert found["ratio"] > 0 and found["goal"] == 4.0


def test_other_readers_read_all(tmp_path: Path) -> None:
    made = webdataset(tmp_path / "shards")
    manifest = index_shards(made.root, quiet)
    index = ShardIndex.load(manifest, "train", 3)
    paths = [manifest.path(entry) for entry in manifest.entries("train")]
    assert compare.read_by_webdataset(paths) == (15, int(index.size.sum()))
    assert compare.read_by_tarfile(paths)[1] == int(index.size.sum())


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--repeats is 0"):
        bench_index(SAMPLE, "test", repeats=0)
    with pytest.raises(UserError, match="no split 'nothing'"):
        bench_index(SAMPLE, "nothing")
