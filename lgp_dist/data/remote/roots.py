"""data.root, local or remote, as a local folder of manifest and indexes and a way to open its shards."""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.remote.cache import ShardCache, locked, make_folders
from lgp_dist.data.remote.fetch import FileSpec, RetryPolicy, fetch, fetch_optional
from lgp_dist.data.remote.transfer import Remote, local_path
from lgp_dist.data.shards.decode import Folder, ShardSource
from lgp_dist.data.shards.index import read_sidecar, sidecar_path
from lgp_dist.data.shards.manifest import MANIFEST_NAME, ShardEntry, ShardManifest
from lgp_dist.data.shards.timm_info import INFO_NAME
from lgp_dist.errors import UserError
from lgp_dist.files import sha256


@dataclass(frozen=True, eq=False)
class Root:
    """An opened root."""

    folder: Path
    """Holds manifest.json and, of a local root, everything else."""
    cache: ShardCache | None
    """Of a remote root's shards; None for a local root."""
    remote: Remote | None = None
    """Where small files come from; None for a local root."""
    patience: RetryPolicy = RetryPolicy()
    """For small files."""

    @property
    def fetches(self) -> bool:
        """Whether shards may have to be fetched."""
        return self.cache is not None

    @property
    def source(self) -> ShardSource:
        """What opens the shards."""
        return Folder() if self.cache is None else self

    def fetch_small(self, name: str, sha256: str = "") -> bool:
        """Brings a small file of the root into `folder` if it is not there; whether it is there then.

        sha256: its hash, where something names it.
        """
        target, part = self.folder / name, self.folder / f".{name}.part"
        if self.remote is None:
            return target.is_file()
        with locked(self.folder / ".lock"):
            if not target.exists():
                if fetch_optional(self.remote, FileSpec(name, sha256=sha256), part, self.patience) is None:
                    return False
                os.replace(part, target)
        return True

    def open_index(self, manifest: ShardManifest, split: str) -> None:
        """Makes the split's index be in `folder`; raises UserError where a remote root has none that fits.

        A local root is checked instead for missing shards and wrong sizes.
        """
        if self.remote is None:
            return manifest.check(split)
        manifest.entries(split)
        name = sidecar_path(self.folder, split).name
        if self.fetch_small(name) and read_sidecar(manifest, split) is None:
            (self.folder / name).unlink(missing_ok=True)  # it may have come from an older upload
            self.fetch_small(name)
        if read_sidecar(manifest, split) is None:
            (self.folder / name).unlink(missing_ok=True)
            raise UserError(
                f"{self.remote.url(name)} is missing or does not belong to {MANIFEST_NAME}: run `lgp shards index` on"
                " the folder of the shards and upload what it writes."
            )

    def open(self, path: Path) -> int:
        """Handle to read a shard; path: where the manifest has it, inside `folder`. Raises UserError or OSError."""
        assert self.cache is not None, "shards of a local root are opened in their folder"
        return self.cache.open(path.relative_to(self.folder).as_posix())

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetches these shards in this order in the background, in place of those that were named before."""
        assert self.cache is not None
        self.cache.prefetch(names)

    def counts(self) -> dict[str, int]:
        """Shards that were here when they were opened, those that were waited for, and bytes that were fetched."""
        assert self.cache is not None
        return {"cache_hits": self.cache.hits, "cache_misses": self.cache.misses, "cache_bytes": self.cache.bytes}


def open_root(data: DataConfig) -> Root:
    """Opens data.root; fetches the manifest of a remote one, once in this process. Raises UserError if it cannot."""
    local = local_path(data.root)
    if local is not None:
        return Root(local, None)
    folder = Path(data.cache).expanduser() if data.cache else default_folder()
    return _open_remote(data.root, folder, data.cache_bytes, RetryPolicy(data.timeout_s, data.retries))


def local_root(data: DataConfig) -> Path:
    """The folder that holds manifest.json of data.root: the root itself, or the place in the cache of a remote one."""
    return open_root(data).folder


def default_folder() -> Path:
    """Where the cache is unless data.cache names a folder: $XDG_CACHE_HOME/lgp, else ~/.cache/lgp."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lgp"


@lru_cache(maxsize=16)
def _open_remote(root: str, folder: Path, limit_bytes: int, patience: RetryPolicy) -> Root:
    """Kept, so that all splits and stages of a process see one version of the manifest and share one cache."""
    remote, roots = Remote(root, patience.timeout_s), folder / "roots"
    make_folders(roots)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", root.split("://", 1)[1]).strip("_")[-80:]
    with tempfile.TemporaryDirectory(dir=roots, prefix=".new-") as new:
        part = Path(new) / MANIFEST_NAME
        fetch(remote, FileSpec(MANIFEST_NAME), part, patience)
        try:
            manifest = ShardManifest.load(new)
        except UserError as error:
            raise UserError(str(error).replace(new, remote.root)) from error
        version = roots / f"{name}-{sha256(part)[:12]}"
        make_folders(version)
        os.replace(part, version / MANIFEST_NAME)
    shards: dict[str, ShardEntry] = {entry.name: entry for split in manifest.splits.values() for entry in split}
    opened = Root(version, ShardCache(root, folder, limit_bytes, shards, patience), remote, patience)
    opened.fetch_small(INFO_NAME)
    return opened
