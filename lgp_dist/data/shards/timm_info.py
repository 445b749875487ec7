"""`_info.json`: the splits and their sizes, as timm's reader of WebDataset shards expects them."""

import json
from typing import Any

from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.files import write_atomic

INFO_NAME = "_info.json"


def write_info(manifest: ShardManifest) -> None:
    """Writes root/_info.json with the manifest's splits; keeps the other entries of an existing one."""
    info = with_splits(read_info(manifest), manifest)
    write_atomic(manifest.root / INFO_NAME, (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())


def read_info(manifest: ShardManifest) -> dict[str, Any]:
    """root/_info.json; nothing if it is missing or no object."""
    try:
        stored = json.loads((manifest.root / INFO_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def with_splits(info: dict[str, Any], manifest: ShardManifest) -> dict[str, Any]:
    """The entries of an _info.json with the manifest's splits."""
    before = info.get("splits")
    kept = before if isinstance(before, dict) else {}
    splits = {
        split: {
            **(kept[split] if isinstance(kept.get(split), dict) else {}),
            "name": split,
            "num_samples": sum(entry.samples for entry in entries),
            "filenames": [entry.name for entry in entries],
            "shard_lengths": [entry.samples for entry in entries],
        }
        for split, entries in manifest.splits.items()
    }
    return info | {"splits": splits}
