"""The readers of bytes that `lgp bench data` compares: each reads what is in the shards, or says so."""

from pathlib import Path

import pytest
from shard_helpers import quiet, webdataset

from lgp_dist.bench.loaders.readers import WAYS, read_by_tarfile, read_by_webdataset, reader
from lgp_dist.data.shards.index import ShardIndex, index_shards


@pytest.mark.parametrize("name", sorted(WAYS.keys() - {"tarfile-index"}))
def test_reader_reads_all(tmp_path: Path, name: str) -> None:
    """All but tarfile, which counts samples by their .cls: half of these have their label in a .json."""
    made = webdataset(tmp_path / "shards")
    index_shards(made.root, quiet)
    assert reader(name, made.root)() == len(made.splits["train"]) == 15


def test_reader_of_other_shards_says_so(tmp_path: Path) -> None:
    """An index of two shards, one of which is replaced by the other: webdataset says nothing, the reader does."""
    made = webdataset(tmp_path / "shards")
    index_shards(made.root, quiet)
    first, *_, last = sorted(made.root.glob("*train*.tar"))
    last.write_bytes(first.read_bytes())
    with pytest.raises(RuntimeError, match="webdataset-index read"):
        reader("webdataset-index", made.root)


def test_other_readers_read_all(tmp_path: Path) -> None:
    made = webdataset(tmp_path / "shards")
    manifest = index_shards(made.root, quiet)
    index = ShardIndex.load(manifest, "train", 3)
    paths = [manifest.path(entry) for entry in manifest.entries("train")]
    assert read_by_webdataset(paths) == (15, int(index.size.sum()))
    assert read_by_tarfile(paths)[1] == int(index.size.sum())
