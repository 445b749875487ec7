"""`_info.json`: the splits and their sizes, as timm's reader of WebDataset shards expects them."""

import json
from typing import Any

from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.files import write_atomic

INFO_NAME = "_info.json"


def write_info(manifest: ShardManifest) -> None:
    """Writes root/_info.json with the manifest's splits; keeps the other entries of an existing one."""
    path = manifest.root / INFO_NAME
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        stored = {}
    info: dict[str, Any] = stored if isinstance(stored, dict) else {}
    before = info.get("splits")
    splits = dict(before) if isinstance(before, dict) else {}
    for split, entries in manifest.splits.items():
        kept = splits.get(split)
        splits[split] = {
            **(kept if isinstance(kept, dict) else {}),
            "name": split,
            "num_samples": sum(entry.samples for entry in entries),
            "filenames": [entry.name for entry in entries],
            "shard_lengths": [entry.samples for entry in entries],
        }
    info["splits"] = {split: splits[split] for split in splits if split in manifest.splits}
    write_atomic(path, (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())
