"""Refuses ranks that start with another recipe, code, packages or shards, and names the difference.

Such ranks would train something else together, or wait for each other forever: gloo adds float32 to int32 without an
error. Ranks compare a flat dictionary of plain values. They first compare its hash, 48 bits in a tensor whose type and
shape never change; only if hashes differ do they exchange the values, as JSON in bytes.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.watch.heartbeat import listed
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.run.checks import SOURCES

PATIENCE = timedelta(minutes=5)
"""How long a rank waits for the facts of a rank that has joined and may still read the manifest of a remote root."""
COMPARED_S = 240.0
"""Seconds after which the watchdog names the rank that is waited for, before PATIENCE ends."""

PER_RANK = frozenset(
    {
        "data.root",  # inputs may be anywhere; fingerprints are compared
        *SOURCES,
        "model.rows.weights",
        "data.threads",  # speed, disks, network
        "data.cache",
        "data.cache_bytes",
        "data.timeout_s",
        "data.retries",
        "engine.threads",  # cores
        "engine.device",  # auto and cuda can be the same; the device itself is compared
        "debug",  # how a rank shows its own errors
    }
)
"""Settings that may differ between ranks, without the numbers of rows. Others may not, even if they may differ between
runs: ranks that write, measure, check or reduce in different steps wait for each other forever."""

REFUSAL = "refusal"
"""Key under which a rank that refuses its own recipe or inputs gives its reason, a sentence."""
SHOWN = 3
"""Differences that the message spells out."""
LONGEST = 120
"""Characters of a value that it shows."""


def facts_of(settings: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
    """Returns what all ranks must share of flat settings and launch, by dotted key."""
    facts = {key: value for key, value in settings.items() if re.sub(r"\.\d+\.", ".", key) not in PER_RANK}
    facts |= {f"launch.{name}": getattr(launch, name) for name in ("world", "deepspeed", "zero_stage", "precision")}
    return facts | {"launch.file": dict(launch.file)}


def check_equal(facts: Mapping[str, Any], workers: Workers) -> None:
    """Raises UserError on all ranks if one has other facts than rank 0. Every rank calls it.

    facts: plain values (as in JSON) by key.
    """
    if workers.world == 1:
        return
    head = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()[:6]
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    patient = replace(workers, host=group)
    try:
        if patient.equal(int.from_bytes(head)):
            return
        found = patient.gather(dict(facts))
    finally:
        torch.distributed.destroy_process_group(group)
    raise UserError(_message(found))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns `key: 'theirs' there, 'ours' here` for each key in which two ranks differ; 1, 1.0 and true differ."""

    def shown(facts: Mapping[str, Any], key: str) -> str:
        text = repr(facts[key]) if key in facts else "nothing"
        return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."

    def same(key: str) -> bool:
        return key in ours and key in theirs and json.dumps(ours[key]) == json.dumps(theirs[key])

    keys = sorted(key for key in ours.keys() | theirs.keys() if not same(key))
    return [f"{key}: {shown(theirs, key)} there, {shown(ours, key)} here" for key in keys]


def _message(facts: list[dict[str, Any]]) -> str:
    """Why ranks that differ cannot start."""
    for rank, theirs in enumerate(facts):
        if REFUSAL in theirs:
            return f"Rank {rank} cannot start as the others do: {theirs[REFUSAL]}"
    found = {rank: differences(facts[0], theirs) for rank, theirs in enumerate(facts)}
    first, *others = [rank for rank, differing in found.items() if differing]
    more = f" (and {len(found[first]) - SHOWN} more)" if len(found[first]) > SHOWN else ""
    too = f"; {listed(others)} too" if others else ""
    return (
        f"Rank {first} differs from rank 0 in {'; '.join(found[first][:SHOWN])}{more}{too}: start every rank with the "
        "same recipe, launch file, code, packages and shards."
    )
