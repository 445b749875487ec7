"""The ledger: counted by hand, over restarts and world sizes, and what it says of an under-drawn path."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from run_helpers import SMALL, Lgp

from lgp_dist.paths.ledger import build_ledger, under_drawn
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.report.html import draws_section
from lgp_dist.stages.finetune import draws_of

SPACE = PathSpace((32, 96), 6, 28, 7, 1, 10)
COSTS = tuple(float(SPACE.cost(path).flops) for path in SPACE.paths)


def thirds(world: int) -> dict[str, float]:
    return {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}


def alone(world: int) -> int:
    return 1


def line(step: int, path: str, **more: Any) -> dict[str, Any]:
    return {"stage": "finetune", "step": step, "path": list(path), **more}


def by_key(ledger: dict[str, Any], field: str) -> dict[str, Any]:
    return {path["key"]: path[field] for path in ledger["paths"]}


def test_counts_by_hand() -> None:
    """Two ranks with two micro-steps each, rank by rank: draws, shares, ranks and last steps."""
    ledger = build_ledger([line(0, "aabc"), line(1, "abbb"), line(2, "aaab")], thirds, alone, 2)
    assert (ledger["steps"], ledger["draws"], ledger["ranks"]) == (3, 12, 2)
    assert by_key(ledger, "draws") == {"a": 6, "b": 5, "c": 1}
    assert by_key(ledger, "ranks") == {"a": [5, 1], "b": [1, 4], "c": [0, 1]}
    assert by_key(ledger, "last_step") == {"a": 2, "b": 2, "c": 0}
    assert by_key(ledger, "share") == {
        "a": 0.5,
        "b": pytest.approx(5 / 12, abs=1e-6),
        "c": pytest.approx(1 / 12, abs=1e-6),
    }
    assert set(by_key(ledger, "expected_share").values()) == {round(1 / 3, 6)}
    assert under_drawn(ledger) == []


def test_another_world_size_after_a_restart() -> None:
    """Lines of one rank, then of three: a rank's draws go to that rank, and each line counts by its length."""
    ledger = build_ledger([line(0, "ab"), line(1, "ccabab"), line(2, "ccabab")], thirds, alone, 2)
    assert ledger["draws"] == 14 and ledger["ranks"] == 3
    assert by_key(ledger, "ranks") == {"a": [1, 2, 2], "b": [1, 2, 2], "c": [4, 0, 0]}
    said = build_ledger([line(0, "ab", world=2, accumulate=1), line(1, "cc", world=1, accumulate=2)], thirds, alone, 7)
    assert by_key(said, "ranks") == {"a": [1, 0], "b": [0, 1], "c": [2, 0]}


def test_a_repeated_step_counts_once() -> None:
    """A restart made steps 1 and 2 again, on more ranks: the later lines count."""
    lines = [line(0, "a"), line(1, "a"), line(2, "a"), line(1, "bb"), line(2, "bc")]
    ledger = build_ledger(lines, thirds, alone, 1)
    assert by_key(ledger, "draws") == {"a": 1, "b": 3, "c": 1}
    assert by_key(ledger, "last_step") == {"a": 0, "b": 2, "c": 2}
    assert ledger["steps"] == 3


def test_expected_shares_follow_the_ranks_of_each_line() -> None:
    """Where shares depend on the number of ranks, each line expects those of its own."""

    def shares(world: int) -> dict[str, float]:
        return {"a": 1 / world, "b": 1 - 1 / world}

    ledger = build_ledger([line(0, "ab"), line(1, "abbb")], shares, alone, 1)
    assert by_key(ledger, "expected_share") == {"a": round(2 / 6, 6), "b": round(4 / 6, 6)}


def test_a_path_that_is_under_drawn() -> None:
    """300 draws of thirds have a standard deviation of 8.2: 68 are fine, 66 are 4.2 below."""
    for draws, late in ((68, []), (66, ["c"])):
        lines = [line(step, "c" if step < draws else "ab"[step % 2]) for step in range(300)]
        assert under_drawn(build_ledger(lines, thirds, alone, 1)) == late


def test_a_path_that_never_comes() -> None:
    """Noted from ten expected draws on; where all ranks draw as one, from ten expected draws of them all."""
    for steps, late in ((29, []), (30, ["c"])):
        assert (
            under_drawn(build_ledger([line(step, "ab"[step % 2]) for step in range(steps)], thirds, alone, 1)) == late
        )
        together = [line(step, "ab"[step % 2] * 8) for step in range(steps)]
        assert under_drawn(build_ledger(together, thirds, lambda world: world, 1)) == late


def test_no_lines_and_unknown_paths() -> None:
    empty = build_ledger([], thirds, alone, 1)
    assert (empty["steps"], empty["draws"], under_drawn(empty)) == (0, 0, [])
    assert by_key(empty, "last_step") == {"a": None, "b": None, "c": None}
    strange = build_ledger([line(0, "xa")], thirds, alone, 1)
    assert by_key(strange, "draws") == {"a": 1, "b": 0, "c": 0, "x": 1}
    assert by_key(strange, "expected_share")["x"] == 0 and under_drawn(strange) == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["independent", "shared", "spread", "balanced"])
@pytest.mark.parametrize(("accumulate", "sandwich"), [(1, False), (4, False), (4, True)])
def test_a_sampler_never_looks_under_drawn_to_itself(
    policy: str, accumulate: int, sandwich: bool, tmp_path: Path
) -> None:
    """Metrics of a run that went on at other world sizes: draws as planned, and no alarm at any length."""
    sampler = PathSampler(SPACE.paths, policy, 2, accumulate, COSTS, sandwich=sandwich)
    lines, wanted = [], Counter()
    for step in range(240):
        world = (4, 3, 64)[step // 80]
        plan = sampler.plan(step, world)
        keys = [plan[micro][rank].key for rank in range(world) for micro in range(accumulate)]
        wanted.update(keys)
        lines.append({"stage": "finetune", "step": step, "path": keys})
    for length in (1, 5, 30, 80, 200, 240):
        file = tmp_path / f"{length}.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in lines[:length]))
        assert under_drawn(draws_of(file, sampler)) == []
    ledger = draws_of(file, sampler)
    assert by_key(ledger, "draws") == {path.key: wanted[path.key] for path in sampler.paths}
    assert sum(by_key(ledger, "expected_share").values()) == pytest.approx(1, abs=1e-4)


def test_the_table_of_the_report() -> None:
    """Every path with its numbers, marks and a sentence for an under-drawn one; nothing without a ledger."""
    lines = [line(step, "ab"[step % 2]) for step in range(300)]
    text = draws_section(build_ledger(lines, thirds, alone, 1))
    cells = [re.sub(r"<[^>]*>", " ", row).split() for row in text.split("<tr>")[2:]]
    assert cells[0] == ["a", "150", "50.00", "33.33", "150", "to", "150", "298"]
    assert cells[2] == ["c", "under-drawn", "0", "0.00", "33.33", "0", "to", "0", "never"]
    assert "Drawn less often" in text and "300 draws in 300 steps" in text
    fine = draws_section(build_ledger([line(0, "abc")], thirds, alone, 1))
    assert "Drawn less often" not in fine and "no path was drawn less often" in fine
    assert draws_section(None) == ""
    hostile = build_ledger([], lambda world: {"<script>": 1.0}, alone, 1)
    assert "<script>" not in draws_section(hostile)


def test_a_run_writes_and_shows_its_ledger(finished: Path) -> None:
    """The artifact's ledger against a count of metrics.jsonl; the report has the table."""
    run = finished / "run"
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    keys = Counter(key for each in lines if each["stage"] == "finetune" for key in each["path"])
    ledger = json.loads((run / "finetune" / "ledger.json").read_text())
    assert by_key(ledger, "draws") == {path.key: keys[path.key] for path in SPACE.paths} and keys.total() == 2
    assert "ledger.json" in json.loads((run / "finetune" / "artifact.json").read_text())["files"]
    assert 'id="draws"' in (run / "report.html").read_text()


@pytest.mark.slow
def test_balanced_run_on_measured_costs(finished_place: Path, lgp: Lgp) -> None:
    """`bench paths` measures, `finetune` draws the named paths by it; a changed table is refused, then forced."""
    made = lgp("bench", "paths", "tiny", "--out", "costs.json", "--batch=2", "--repeats=1", "--engine.threads=1")
    assert made.status == 0 and all(made.out.count(f" {path.key} ") == 1 for path in SPACE.paths)
    table = json.loads(Path("costs.json").read_text())
    assert list(table["costs"]) == [path.key for path in SPACE.paths]
    assert all(seconds > 0 for seconds in [*table["costs"].values(), table["ancestry"]])
    assert table["costs"].keys() | {"ancestry"} == table["spread"].keys()
    assert table["machine"]["threads"] == 1 and {"platform", "processor", "device"} <= table["machine"].keys()
    assert {"versions", "commit", "precision", "batch", "repeats"} <= table.keys()
    only = [SPACE.paths[index].key for index in (0, 1, 5, 9)]
    asked = ["--finetune.policy=balanced", "--finetune.costs=costs.json", "--finetune.train.accumulate=2"]
    asked += ["--finetune.only", *only]
    assert lgp("finetune", *SMALL, *asked, "--force").status == 0
    ledger = json.loads(Path("run/finetune/ledger.json").read_text())
    assert [path["key"] for path in ledger["paths"]] == only and ledger["draws"] == 4
    assert sum(len(path["ranks"]) for path in ledger["paths"]) == 4
    table["costs"][only[0]] *= 2
    Path("costs.json").write_text(json.dumps(table))
    assert "finetune.costs was" in lgp("finetune", *SMALL, *asked).sentence
    assert "skipped" in lgp("pool", *SMALL, *asked).err
    assert "--finetune.only" not in lgp("finetune", *SMALL, *asked, "--force").err


@pytest.mark.parametrize(
    ("setting", "pieces"),
    [
        (["--finetune.costs=nowhere.json"], ["nowhere.json", "JSON"]),
        (["--finetune.sandwich"], ["finetune.sandwich", "accumulate"]),
        (["--finetune.only", "r0.0-9"], ["finetune.only", "'r0.0-9'"]),
        (["--finetune.row-weight=0"], ["finetune.row_weight", "0"]),
    ],
)
def test_bad_settings_of_the_schedule(place: Path, lgp: Lgp, setting: list[str], pieces: list[str]) -> None:
    """One sentence before anything starts."""
    sentence = lgp("finetune", *SMALL, *setting).sentence
    assert all(piece in sentence for piece in pieces), sentence
    assert not Path("run/config.json").exists()
