"""Ranks that run with another recipe, code, packages or shards are refused at start, and named.

Ranks which differ would train something else together, or wait for each other for ever: gloo adds float32 to int32
without an error. What is compared is a flat dictionary of plain values. First a hash of it travels, in tensors whose
type and shape never change; only where hashes differ the values follow, as JSON in bytes.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.watch.heartbeat import listed
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError

PATIENCE = timedelta(minutes=5)
"""How long a rank waits here for one that has joined, and reads the manifest of a remote root."""
COMPARED_S = 240.0
"""Seconds after which the watchdog says for whom it waits, before that."""

PER_RANK = frozenset(
    {
        *(
            "data.root",
            "ancestry.weights",
            "model.rows.weights",
            "finetune.weights",
        ),  # lie anywhere; fingerprints compare
        "finetune.costs",  # likewise
        *("data.threads", "data.cache", "data.cache_bytes", "data.timeout_s", "data.retries"),  # speed, disks, network
        *("engine.threads", "engine.device"),  # cores; auto and cuda can be the same, and the device itself is compared
        "debug",  # how a rank's own errors are shown
    }
)
"""Settings that may differ between ranks. No other may, even if it may differ between runs: ranks that write, measure,
check or reduce at other steps wait for each other for ever. Rows have no number here."""

REFUSAL = "refusal"
"""Fact of a rank that refuses its own recipe or inputs: the sentence that says why."""
SHOWN = 3
"""Differences that the sentence spells out."""
LONGEST = 120
"""Characters of a value that it shows."""


def facts_of(settings: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
    """What flat settings and launch say and all ranks must share, by dotted key."""
    facts = {key: value for key, value in settings.items() if re.sub(r"\.\d+\.", ".", key) not in PER_RANK}
    for name in ("world", "deepspeed", "zero_stage", "precision"):
        facts[f"launch.{name}"] = getattr(launch, name)
    return facts | {"launch.file": dict(launch.file)}


def check_equal(facts: Mapping[str, Any], workers: Workers) -> None:
    """UserError on all ranks where one has other facts than rank 0; called by all of them.

    facts: plain values (what JSON has) by key.
    """
    if workers.world == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    head = hashlib.sha256(text).digest() + len(text).to_bytes(8, "little")
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        heads = _gather(head, workers.world, group)
        if len(set(heads)) == 1:
            return
        longest = max(int.from_bytes(other[32:], "little") for other in heads)
        texts = _gather(text.ljust(longest), workers.world, group)
    finally:
        torch.distributed.destroy_process_group(group)
    raise UserError(_sentence([json.loads(other) for other in texts]))


def _gather(message: bytes, world: int, group: Any) -> list[bytes]:
    """Every rank's message; all are of one length."""
    mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(rows, mine, group=group)
    return [row.numpy().tobytes() for row in rows]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """`key: 'theirs' there, 'ours' here` for each key in which two ranks differ; 1, 1.0 and true differ."""

    def shown(facts: Mapping[str, Any], key: str) -> str:
        text = repr(facts[key]) if key in facts else "nothing"
        return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."

    def same(key: str) -> bool:
        return key in ours and key in theirs and json.dumps(ours[key]) == json.dumps(theirs[key])

    keys = sorted(key for key in ours.keys() | theirs.keys() if not same(key))
    return [f"{key}: {shown(theirs, key)} there, {shown(ours, key)} here" for key in keys]


def _sentence(facts: list[dict[str, Any]]) -> str:
    for rank, theirs in enumerate(facts):
        if REFUSAL in theirs:
            return f"Rank {rank} cannot start as the others do: {theirs[REFUSAL]}"
    found = {rank: differences(facts[0], theirs) for rank, theirs in enumerate(facts)}
    ranks = [rank for rank, differing in found.items() if differing]
    if not ranks:
        return "Hashes of what ranks run with differ, but not what they were taken of: start again, and report it."
    first = found[ranks[0]]
    more = f" (and {len(first) - SHOWN} more)" if len(first) > SHOWN else ""
    others = f"; {listed(ranks[1:])} too" if len(ranks) > 1 else ""
    return (
        f"Rank {ranks[0]} differs from rank 0 in {'; '.join(first[:SHOWN])}{more}{others}: start every rank with the "
        "same recipe, launch file, code, packages and shards."
    )
