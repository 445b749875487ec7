"""data.root, local or remote: a local folder of manifest and indexes, and a source that opens its shards."""

import logging
import os
import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.remote.address import local_path
from lgp_dist.data.remote.cache import ShardCache, locked, make_folders
from lgp_dist.data.remote.fetch import RetryPolicy, fetch
from lgp_dist.data.remote.transfer import MissingFile, Remote
from lgp_dist.data.shards.index import read_sidecar, sidecar_path
from lgp_dist.data.shards.manifest import INFO_NAME, MANIFEST_NAME, ShardManifest
from lgp_dist.errors import UserError
from lgp_dist.files import sha256

log = logging.getLogger("lgp")

NETWORKS = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "glusterfs", "sshfs", "afs", "9p"}
"""File systems of other machines: a cache there would send each shard over the network twice."""


@dataclass(frozen=True)
class LocalRoot:
    """A folder of this machine."""

    folder: Path

    def open_index(self, manifest: ShardManifest, split: str) -> None:
        """UserError where a shard of the split is missing or has another size."""
        manifest.check(split)


@dataclass(frozen=True, eq=False)
class RemoteRoot:
    """A remote root."""

    folder: Path
    """Holds manifest.json, and the indexes that were opened."""
    cache: ShardCache
    """Holds the shards: their ShardSource."""

    def open_index(self, manifest: ShardManifest, split: str) -> None:
        """Fetches the split's index; UserError if no index fits the manifest."""
        manifest.entries(split)
        path = sidecar_path(self.folder, split)
        for _ in range(2):  # the first one may be cached from an older upload
            if self.fetch_small(path.name) and read_sidecar(manifest, split) is not None:
                return
            path.unlink(missing_ok=True)
        raise UserError(
            f"{self.cache.remote.url(path.name)} is missing or does not belong to {MANIFEST_NAME}: run `lgp shards"
            " index` on the folder of the shards and upload what it writes."
        )

    def fetch_small(self, name: str) -> bool:
        """Fetches a small file into `folder` unless it is there; False where the root has none."""
        target, part = self.folder / name, self.folder / f".{name}.part"
        with locked(self.folder / ".lock"):
            if not target.exists():
                try:
                    fetch(self.cache.remote, name, part, self.cache.policy)
                except UserError as error:
                    if isinstance(error.__cause__, MissingFile):
                        return False
                    raise
                os.replace(part, target)
        return True


def open_root(data: DataConfig) -> LocalRoot | RemoteRoot:
    """Opens data.root; fetches the manifest of a remote one, once in this process. Raises UserError if it cannot."""
    local = local_path(data.root)
    if local is not None:
        return LocalRoot(local)
    policy = RetryPolicy(data.timeout_s, data.retries)
    return _open_remote(data.root.rstrip("/"), cache_folder(data.cache), data.cache_bytes, policy)


def cache_folder(named: str) -> Path:
    """The folder of cached shards: the named one, or the user's, or one of TMPDIR where that is on a network."""
    wanted = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lgp")
    try:
        folder = Path(wanted).expanduser()
    except RuntimeError:  # neither HOME nor an entry of this user
        raise UserError(f"{wanted} needs a home directory, which this user does not have: set --data.cache.") from None
    mounts = {} if named else {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    kind = next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "")
    if kind.removeprefix("fuse.") not in NETWORKS:
        return folder
    near = Path(tempfile.gettempdir(), f"lgp-{os.getuid()}")
    make_folders(near)
    if near.lstat().st_uid != os.getuid():
        raise UserError(f"{near} belongs to another user: set --data.cache to a folder on a disk of this node.")
    log.info("shards are cached in %s, since %s is on a network (%s)", near, folder, kind)
    return near


def load_manifest(data: DataConfig) -> ShardManifest:
    """The manifest of data.root; raises UserError."""
    return ShardManifest.load(open_root(data).folder)


@lru_cache(maxsize=16)
def _open_remote(address: str, folder: Path, limit_bytes: int, policy: RetryPolicy) -> RemoteRoot:
    """Cached, so that all splits and stages of a process see one version of the manifest and share one ShardCache."""
    remote, roots = Remote(address, policy.timeout_s), folder / "roots"
    make_folders(roots)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", address.split("://", 1)[1]).strip("_")[-80:]
    with tempfile.TemporaryDirectory(dir=roots, prefix=".new-") as new:
        part = Path(new) / MANIFEST_NAME
        fetch(remote, MANIFEST_NAME, part, policy)
        try:
            manifest = ShardManifest.load(new)
        except UserError as error:
            raise UserError(str(error).replace(new, address)) from error
        if manifest.folder:
            raise UserError(
                f"{address}/{MANIFEST_NAME} has folder {manifest.folder}, but must lie next to its shards: run `lgp"
                " shards index` without --out and upload what it writes."
            )
        version = roots / f"{name}-{sha256(part)[:12]}"
        make_folders(version)
        os.replace(part, version / MANIFEST_NAME)
    shards = [entry for split in manifest.splits.values() for entry in split]
    opened = RemoteRoot(version, ShardCache(remote, folder, limit_bytes, shards, policy))
    opened.fetch_small(INFO_NAME)
    return opened
