"""Who is to blame, from what ranks say of themselves; the counter that tells who lives."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lgp_dist.engine.watch.heartbeat import Beat, Pulse, beat_file, judge, read_beats, sentence
from lgp_dist.files import write_json

BEAT = Beat(0, "host", 1, "aa", 5, "pool", 2, 7, "reduce", "B3", 40.0, True, "loop.py:1 train")


def ranks(*changes: dict) -> dict[int, Beat]:
    return {rank: replace(BEAT, rank=rank, **change) for rank, change in enumerate(changes)}


AHEAD, BEHIND, BUSY = {"notes": 3}, {"step": 6, "notes": 1}, {"waits": False}


@pytest.mark.parametrize(
    ("beats", "silent", "expected", "reason"),
    [
        (ranks({}, {}), [1], (1,), "silent"),
        (ranks({}, BUSY), [0], (0,), "silent"),
        (ranks({}, BUSY, {}), [], (1,), "busy"),
        (ranks({}, BUSY | AHEAD), [], (1,), "busy"),
        (ranks({}, AHEAD), [], (1,), "apart"),
        (ranks({}, BEHIND), [], (0,), "apart"),
        (ranks(AHEAD, AHEAD, {}), [], (2,), "apart"),
        (ranks(BUSY, BUSY | BEHIND, BUSY), [], (1,), "behind"),
        (ranks({}, {}, {}), [], (), "together"),
        (ranks(BUSY, BUSY), [], (), "together"),
        (ranks(BUSY), [], (), "together"),
    ],
)
def test_judge(beats: dict[int, Beat], silent: list[int], expected: tuple[int, ...], reason: str) -> None:
    verdict = judge(beats, silent)
    assert (verdict.ranks, verdict.reason) == (expected, reason)


def told(beats: dict[int, Beat], silent: list[int], world: int) -> str:
    pulse = Pulse(world, 0.0)
    pulse.see(beats, 0.0)
    return sentence(judge(beats, silent), pulse, 30.0)


def test_sentences() -> None:
    place = "stage pool, step 7, path B3, phase reduce"
    assert told(ranks({}, BUSY, {}), [], 3) == (
        f"Rank 1 (host, pid 1) has made no progress for 40 s: {place}, at loop.py:1 train; ranks 0, 2 wait for it in "
        "step 7, phase reduce."
    )
    assert told(ranks({}, {}), [], 2) == (
        f"All 2 ranks have made no progress for 30 s: {place}, rank 0 at loop.py:1 train."
    )
    assert told(ranks({}), [1], 2) == "Rank 1 has given no sign of life; rank 0 waits for it in step 7, phase reduce."
    assert told(ranks({}, {}, {}, {}), [1, 3], 4).endswith("; ranks 0, 2 wait for them in step 7, phase reduce.")
    none = {"step": None, "path": ""}
    assert told(ranks(none, BUSY | none), [], 2) == (
        "Rank 1 (host, pid 1) has made no progress for 40 s: stage pool, phase reduce, at loop.py:1 train; rank 0 "
        "waits for it in phase reduce."
    )


def test_pulse_counts_by_its_own_clock() -> None:
    """Silent is whose counter stands still, or who never was; a restart under the same counter is a sign of life."""
    pulse = Pulse(3, 100.0)
    for second in range(10):
        pulse.see(ranks({"beat": second}, {"beat": 3, "life": "b" if second < 5 else "c"}), 100.0 + second)
    assert pulse.silent(109.0, 3.0) == [1, 2]
    assert pulse.silent(109.0, 5.0) == [2]
    assert pulse.silent(109.0, 9.5) == []


def test_beats_survive_the_disk(tmp_path: Path) -> None:
    """Missing, cut and foreign files are ranks that say nothing."""
    write_json(beat_file(tmp_path, 0), asdict(BEAT))
    (tmp_path / "rank-1.json").write_text('{"rank": 1')
    (tmp_path / "rank-2.json").write_text("[]")
    assert read_beats(tmp_path, 4) == {0: BEAT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.json", "rank-1.json", "rank-2.json"]
