"""`--compare`: ratios to a stored result; `lgp bench scaling`: a model that is fitted and judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import Lgp, has

from lgp_dist.bench.baseline_ratios import FIELDS, as_rows, baseline_ratios
from lgp_dist.bench.sampler import measure, with_policy
from lgp_dist.bench.scaling import FACTORS, amounts_of, fit
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import tiny_paper

STORED = Path(__file__).parents[2] / "benchmarks"


def engine_row(ms: float, spread: float, **more: Any) -> dict[str, Any]:
    return {"recipe": "tiny", "engine": "ddp", "ranks": 2, "ms_per_work": ms, "spread": spread, "peak_mb": 100} | more


def test_ratios_and_what_spreads_leave_open() -> None:
    before, now = [engine_row(100.0, 0.1), engine_row(7.0, 0, ranks=4)], [engine_row(150.0, 0.2, commit="other")]
    time, memory = baseline_ratios("engine", now, before)
    assert time["ratio"] == 1.5 and time["differs"]
    assert time["low"] == pytest.approx(135 / 105, abs=1e-4) and time["high"] == pytest.approx(165 / 95, abs=1e-4)
    assert (memory["measure"], memory["ratio"], memory["differs"]) == ("peak_mb", 1.0, False)
    assert not baseline_ratios("engine", [engine_row(105.0, 0.1)], before)[0]["differs"]
    assert baseline_ratios("engine", [engine_row(1.0, 0.1, engine="zero1")], before) == []


def test_a_table_of_paths_is_an_object_for_each() -> None:
    table = {"recipe": "tiny", "precision": "fp32", "batch": 2, "costs": {"a": 1.0, "b": 2.0}, "spread": {"a": 0.1}}
    rows = as_rows(table)
    assert [(one["path"], one["seconds"], one["spread"]) for one in rows] == [("a", 1.0, 0.1), ("b", 2.0, None)]
    assert [one["ratio"] for one in baseline_ratios("paths", as_rows(table | {"costs": {"b": 3.0}}), rows)] == [1.5]


@pytest.mark.parametrize(("bench", "file"), [("engine", "engines"), ("checkpoint", "checkpoint"), ("data", "data")])
def test_stored_results_are_told_apart_by_their_fields(bench: str, file: str) -> None:
    """Every object of a committed file is compared with itself alone, measure by measure."""
    rows = json.loads((STORED / f"{file}.json").read_text())
    measured = sum(row.get(name) is not None for row in rows for name in FIELDS[bench].measures)
    found = baseline_ratios(bench, rows, rows)
    assert len(found) == measured >= len(rows) - 1 and all(one["ratio"] == 1 for one in found)


@pytest.mark.slow
def test_a_command_compares_with_a_file(lgp: Lgp, tmp_path: Path) -> None:
    call = ("bench", "sampler", "--recipe=pool12", "--ranks=8", "--micro-steps=1", "--compare")
    result = lgp(*call, STORED / "sampler.json")
    has(result.out, "now over before", "pool12 balanced step 8 1", "efficiency", "1.0")
    asked = lgp(*call, STORED / "sampler.json", "--json")
    assert len(json.loads(asked.out)) == 4 and "now over before" in asked.err
    (tmp_path / "other.json").write_text(json.dumps([{"recipe": "pool13"}]))
    has(lgp(*call, tmp_path / "other.json").out, "nothing that was measured here")


@pytest.mark.parametrize(
    ("content", "pieces"),
    [(None, ["cannot be read"]), ("{", ["not valid JSON"]), ("[]", ["no objects"]), ('[{"a": 1}]', ["without recipe"])],
)
def test_a_file_that_is_none_is_refused_first(lgp: Lgp, tmp_path: Path, content: str | None, pieces: list[str]) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    has(lgp("bench", "sampler", "--compare", file).sentence, "--compare", str(file), *pieces)


TRUE = (0.05, 0.002, 1e-9, 0.003, 0.0004, 2e-9)
"""Seconds for each unit of FACTORS."""


def measured(ranks: int, gmacs: float, weights: int, **more: Any) -> dict[str, Any]:
    """An object of `lgp bench engine` whose time the model gives."""
    row = {"recipe": "tiny", "engine": "ddp", "reduction": "all", "policy": "independent", "ranks": ranks}
    row |= {"micro_steps": 1, "bytes_weights": weights, "gmacs": gmacs, "gmacs_slowest": gmacs * (1 + 0.1 * ranks)}
    row |= {"machine": {"threads": 1, "cores": 2}, "widths": [32, 96], "images": 8, "spread": 0.1} | more
    return row | {"ms": 1e3 * float(np.dot(TRUE, amounts_of(row)))}


def rows() -> list[dict[str, Any]]:
    sizes = [(1.0, 10**6), (3.0, 10**6), (2.0, 10**8), (0.5, 10**7)]
    return [measured(ranks, work, weights) for ranks in (1, 2, 4, 8) for work, weights in sizes]


def test_the_model_is_found_again() -> None:
    """Least squares without a bound, by NumPy alone, give the same where no factor is at it."""
    model = fit([row for row in rows() if row["ranks"] <= 4])
    assert model == pytest.approx(TRUE, rel=1e-4)
    assert all(model @ amounts_of(row) == pytest.approx(row["ms"] / 1e3, rel=1e-6) for row in rows())


def test_two_ranks_cannot_tell_a_meeting_from_its_rounds() -> None:
    found = dict(zip(FACTORS, fit([row for row in rows() if row["ranks"] <= 2]), strict=True))
    true = dict(zip(FACTORS, TRUE, strict=True))
    assert found["rounds"] == 0 and found["meeting"] == pytest.approx(true["meeting"] + 2 * true["rounds"], rel=1e-4)
    assert found["work"] == pytest.approx(true["work"], rel=1e-4)


def test_no_factor_is_below_zero() -> None:
    less = [row | {"ms": row["ms"] - 1.9 * row["micro_steps"] * (row["ranks"] == 1)} for row in rows()]
    assert min(fit(less)) >= 0 and len(fit(less)) == len(FACTORS)


def test_scaling_judges_what_was_held_out_and_predicts(lgp: Lgp, tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    slow = [row | {"ms": 1.1 * row["ms"]} if row["ranks"] == 8 else row for row in rows()]
    file.write_text(json.dumps(slow))
    asked = (
        "bench",
        "scaling",
        "tiny_paper",
        "--measured",
        file,
        "--ranks=1,8",
        "--policies=shared,independent",
        "--json",
    )
    found = json.loads(lgp(*asked).out)
    about = found[0]
    assert about["fitted_rows"] == 12 and about["held_out_rows"] == 4
    assert about["fitted_error"] < 1e-3 and about["held_out_error"] == pytest.approx(1 - 1 / 1.1, abs=1e-3)
    predicted = {(row["policy"], row["ranks"]): row for row in found if row["kind"] == "predicted"}
    assert predicted["shared", 1]["efficiency"] == 1 > predicted["shared", 8]["efficiency"]
    assert predicted["shared", 8]["skew_ms"] == 0 < predicted["independent", 8]["skew_ms"]
    space, config = PathSpace.from_config(tiny_paper()), tiny_paper()
    mean = sum(space.cost(path).flops for path in space.paths) / len(space.paths)
    slowest = mean / measure(with_policy(config, "independent", 1), 8, 200)["efficiency"]
    skew = 1e3 * TRUE[0] * 128 * 3 * (slowest - mean) / 1e9
    assert predicted["independent", 8]["skew_ms"] == pytest.approx(skew, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("factor", "held", "pieces"),
    [(1.1, 8, ["4 held-out", "9%", "expect no better"]), (3.0, 8, ["67%", "do not rely"]), (1.0, 2, ["nothing says"])],
)
def test_the_text_says_how_far_to_trust(lgp: Lgp, tmp_path: Path, factor: float, held: int, pieces: list[str]) -> None:
    slow = [row | {"ms": factor * row["ms"]} if row["ranks"] == 8 else row for row in rows() if row["ranks"] <= held]
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(slow))
    call = ("bench", "scaling", "tiny_paper", "--measured", file, "--ranks=1", "--policies=shared")
    has(lgp(*call).out.splitlines()[-1], *pieces)


@pytest.mark.parametrize(
    ("content", "pieces"),
    [(None, ["cannot be read"]), ('[{"ranks": 1}]', ["without ms"]), ("{}", ["without ranks"]), ("[]", ["no objects"])],
)
def test_measurements_that_cannot_be_used(lgp: Lgp, tmp_path: Path, content: str | None, pieces: list[str]) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    has(lgp("bench", "scaling", "tiny_paper", "--measured", file).sentence, "--measured", *pieces)
