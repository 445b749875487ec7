"""Questions, arms, cells and their statistics; no run is made here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from run_helpers import has
from scipy import stats

from lgp_dist.cli.recipe import Recipe
from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.recipes import RECIPES, one_path_a_step, pool12, snnet_tiny, tiny, tiny_paper
from lgp_dist.run.artifacts import Artifact, RunDirectory
from lgp_dist.run.checks import check_config
from lgp_dist.study.cells import Cell, adopt, cells_of, leader_of, shared_stages, take_over
from lgp_dist.study.questions import QUESTIONS, systems
from lgp_dist.study.results import layer_fits, measures, summary, verdicts
from lgp_dist.study.settings import arguments, changed_values, with_values
from lgp_dist.study.statistics import T_95, difference, estimate
from lgp_dist.study.study import chosen, runs_of

ARMS = [(name, arm) for name, question in QUESTIONS.items() for arm in question.arms]
MADE_ONCE = {"stitch_init": 2, "rows": 3, "policy": 3, "instances": 1, "ancestry": 0}
"""Stages that all arms of a question make alike."""


def cells(question: str, out: str = "out", base: RunConfig | None = None) -> list[Cell]:
    return cells_of(QUESTIONS[question], base or tiny(), (0, 1), Path(out))


@pytest.mark.parametrize("base", [tiny, pool12], ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize(("question", "arm"), ARMS, ids=lambda value: getattr(value, "name", value))
def test_an_arm_is_a_command_that_a_person_can_type(question: str, arm: Any, base: Any) -> None:
    """Its options, read by the command line's own parser, give its configuration, which the checks accept."""
    started = replace(base(), run_dir="some where/else", trackers=())
    found = next(cell for cell in cells(question, base=started) if cell.arm == arm and cell.seed == 1)
    check_config(found.config)
    read = tyro.cli(Recipe, args=arguments(found.config), config=(tyro.conf.CascadeSubcommandArgs,))
    assert read == found.config
    assert read.run_dir == f"out/{arm.name}/seed1" and read.seed == 1


@pytest.mark.parametrize(("question", "count"), MADE_ONCE.items())
def test_arms_share_the_stages_before_what_they_change(question: str, count: int) -> None:
    """As many as the table above says, never over seeds, and all arms differ somewhere."""
    found = cells(question)
    first = [cell for cell in found if cell.seed == 0]
    shared = [shared_stages(first[0], cell) for cell in first[1:]]
    assert min(map(len, shared)) == count and all(stages == STAGES[: len(stages)] for stages in shared)
    for cell in found:
        leader, stages = leader_of(cell, found)
        assert len(stages) < len(STAGES)
        assert leader is None or leader.seed == cell.seed and found.index(leader) < found.index(cell)
    assert leader_of(found[0], found) == (None, ())


def test_taken_over_is_the_same_file_and_whole_or_absent(tmp_path: Path) -> None:
    leader, cell = [each for each in cells("rows", str(tmp_path)) if each.seed == 0][:2]
    for stage in ("ancestry", "distil"):
        (leader.folder / stage).mkdir(parents=True)
        (leader.folder / stage / "artifact.json").write_text(stage)
    (leader.folder / "distil" / "rows.safetensors").write_bytes(b"rows")
    (cell.folder / "ancestry").mkdir(parents=True)
    (cell.folder / "ancestry" / "artifact.json").write_text("its own")
    (cell.folder / ".distil.partial").mkdir()  # of a study that was killed
    take_over(cell, leader, ("ancestry", "distil", "pool"))
    assert (cell.folder / "ancestry" / "artifact.json").read_text() == "its own"
    assert (cell.folder / "distil" / "rows.safetensors").samefile(leader.folder / "distil" / "rows.safetensors")
    assert sorted(path.name for path in cell.folder.iterdir()) == ["ancestry", "distil"]


SOURCES = {"data.train": "of the shards"}


def write_weights(folder: Path) -> dict[str, Any]:
    (folder / "weights").write_bytes(b"made")
    return {}


def test_a_study_beside_another_takes_over_what_is_alike(tmp_path: Path) -> None:
    """A whole run where all is, its metrics as a file of its own; what comes before fine-tuning where that differs or
    had other ranks; nothing of another seed, of other sources or of a stage that is not complete."""
    done, other = (replace(cell, sources=SOURCES) for cell in cells("rows", str(tmp_path / "rows"))[:2])
    run, made = RunDirectory(done.folder, SOURCES), list[Artifact]()
    for stage in STAGES:
        made.append(run.write(stage, done.config, made[-1:], write_weights, {"world": 1}))
    (done.folder / "metrics.jsonl").write_text("{}\n")
    (done.folder / "checkpoints").mkdir()
    init = [replace(cell, sources=SOURCES) for cell in cells("stitch_init", str(tmp_path / "init"))]
    arms = {(cell.arm.name, cell.seed): cell for cell in init}
    same = replace(done, config=replace(done.config, run_dir=str(tmp_path / "new" / "same")))
    for cell in (same, other, *arms.values()):
        adopt(cell, [done.folder], 1)
    kept = {path.name for path in same.folder.iterdir()}
    assert kept == {*STAGES, "metrics.jsonl"}
    assert (same.folder / "distil" / "weights").samefile(done.folder / "distil" / "weights")
    assert not (same.folder / "metrics.jsonl").samefile(done.folder / "metrics.jsonl")
    assert not other.folder.exists()
    found = {path.name for path in arms["random", 0].folder.iterdir()}
    assert found == {"ancestry", "distil"} and not arms["random", 1].folder.exists()
    ranks = replace(done, config=replace(done.config, run_dir=str(tmp_path / "new" / "ranks")))
    adopt(ranks, [done.folder], 4)
    assert {path.name for path in ranks.folder.iterdir()} == {"ancestry", "distil", "pool"}
    late = replace(done, config=replace(done.config, run_dir=str(tmp_path / "new" / "late")))
    (done.folder / "finetune" / "artifact.json").unlink()
    adopt(late, [done.folder], 1)
    assert {path.name for path in late.folder.iterdir()} == {"ancestry", "distil", "pool"}
    changed = replace(done, config=replace(done.config, run_dir=str(tmp_path / "new" / "changed")))
    changed = replace(changed, sources={name: "other" for name in SOURCES})
    adopt(changed, [done.folder], 1)
    assert not changed.folder.exists()


def test_the_rows_arms_are_what_they_say() -> None:
    found = {arm.name: arm.change(tiny()).finetune for arm in QUESTIONS["rows"].arms}
    own, unit = tiny().finetune, tiny().distil.train.lr
    assert found["recipe"] == own and found["published"] == tiny_paper().finetune
    assert found["one_path"] == one_path_a_step(tiny()).finetune == snnet_tiny().finetune
    rates = {
        "published": 1,
        "published_x10": 5,
        "own_scale": 1,
        "one_path": 0.5,
        "lower_lr": 0.05,
        "row_lr": 0.5,
        "sandwich": 0.5,
        "recipe": 2,
    }
    assert all(found[name].train.lr == pytest.approx(factor * unit) for name, factor in rates.items())
    for name in ("row_lr", "combined", "recipe"):
        assert found[name].row_lr == (1.0, 0.1)
    assert {name for name, arm in found.items() if arm.train.accumulate == 4} == {
        "four_paths",
        "sandwich",
        "combined",
        "recipe",
    }
    assert {arm.train.batch_size for arm in found.values()} == {own.train.batch_size}
    assert replace(found["sandwich"], sandwich=False) == found["four_paths"]
    again = replace(found["sandwich"], row_lr=own.row_lr, train=replace(found["sandwich"].train, lr=own.train.lr))
    assert again == own


def test_systems_are_recipes_with_the_same_changes() -> None:
    """A setting that a recipe does not have is left out; what it has is set."""
    question = systems(("tiny", "pool18"), "tiny")
    base = replace(tiny(), seed=3, data=replace(tiny().data, root="there", augment=RECIPES["pool12"]().data.augment))
    assert set(changed_values(base)) == {"seed", "data.root", *(f"data.augment.{n}" for n in
        ("crop_scale", "color_jitter", "auto_augment", "random_erase"))}  # fmt: skip
    one, two = (arm.change(base) for arm in question.arms)
    assert one == base
    assert (two.recipe, two.seed, two.data.root, two.model) == ("pool18", 3, "there", RECIPES["pool18"]().model)
    assert with_values(two, {"model.rows.1.heads": 6, "model.rows.7.heads": 1, "no.such": 1}).model.rows[1].heads == 6


@pytest.mark.parametrize(("seeds", "arms", "pieces"), [
    ((), (), ("--seeds", "each once")),
    ((1, 1), (), ("--seeds is 1 1", "each once")),
    ((0,), ("recipe", "nothing"), ("--arms", "'nothing'", "row_lr")),
])  # fmt: skip
def test_what_a_person_can_put_right(seeds: tuple[int, ...], arms: tuple[str, ...], pieces: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        cells_of(chosen(QUESTIONS["rows"], arms), tiny(), seeds, Path("out"))
    has(str(caught.value), *pieces)


def test_a_folder_beside_that_holds_no_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        runs_of([tmp_path / "none"])
    has(str(caught.value), "--beside", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("file", "before"),
    [
        ("data.train", "ancestry"),
        ("ancestry.weights", "ancestry"),
        ("model.rows.0.weights", "distil"),
        ("finetune.costs", "finetune"),
    ],
)
def test_files_of_other_content_share_what_comes_before_them(file: str, before: str) -> None:
    one = cells("rows")[0]
    assert shared_stages(one, one) == STAGES
    assert shared_stages(one, replace(one, sources={file: "other"})) == STAGES[: STAGES.index(before)]


def test_a_run_without_ancestry_takes_over_nothing_from_one_with() -> None:
    found = cells("systems")
    alone = next(cell for cell in found if cell.arm.name == "scratch_tiny" and cell.seed == 0)
    assert not alone.config.needs_ancestry and leader_of(alone, found) == (None, ())


def test_scratch_trains_for_the_epochs_of_both_stages() -> None:
    base = tiny()
    short = replace(base.finetune, train=replace(base.finetune.train, epochs=2.0))
    base = replace(base, finetune=short, distil=replace(base.distil, train=replace(base.distil.train, epochs=3.0)))
    epochs = {arm.name: arm.change(base).finetune.train.epochs for arm in QUESTIONS["systems"].arms}
    assert epochs == {"snnet_tiny": 2, "tiny": 2, "sws_tiny": 2, "vanilla_tiny": 2, "scratch_tiny": 5}


def test_rows_are_judged_by_what_they_were() -> None:
    base = replace(tiny(), evaluate=replace(tiny().evaluate, before=False))
    with pytest.raises(UserError) as caught:
        cells("rows", base=base)
    has(str(caught.value), "evaluate.before", "rows")
    assert not any(cell.config.evaluate.before for cell in cells("policy", base=base))


def test_what_was_not_measured_is_left_out() -> None:
    found = record("one", 0, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    left = measures(found).keys() - measures({**found, "before": []}).keys()
    assert left == {"narrow_before", "wide_before", "mean_before"}


def test_chosen_arms_keep_the_reference() -> None:
    assert [arm.name for arm in chosen(QUESTIONS["rows"], ("row_lr",)).arms] == ["published", "row_lr"]


def test_quantiles_are_those_of_student() -> None:
    np.testing.assert_allclose(T_95, stats.t.ppf(0.975, np.arange(1, len(T_95) + 1)), atol=6e-5)


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_intervals_are_those_of_scipy(count: int) -> None:
    """One sample and pairs; beyond the table, at most 2 % too wide."""
    draw = np.random.default_rng(count)
    one, other = draw.normal(80, 3, count), draw.normal(78, 3, count)
    found = estimate(list(one))
    low, high = stats.ttest_1samp(one, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(one.mean()) and found.count == count
    assert 1 - 1e-4 <= found.half / ((high - low) / 2) <= (1.02 if count > 31 else 1 + 1e-4)
    pairs = difference(dict(enumerate(one)), {**dict(enumerate(other)), 99: 5.0})
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert pairs.mean == pytest.approx((one - other).mean())
    assert 1 - 1e-4 <= pairs.half / ((high - low) / 2) <= (1.02 if count > 31 else 1 + 1e-4)


def test_one_seed_has_no_interval_and_no_common_seed_no_difference() -> None:
    assert str(estimate([3.14159])) == "3.14" and estimate([1.0]).half is None
    assert difference({0: 1.0}, {1: 2.0}) is None


def record(arm: str, seed: int, before: tuple[float, ...], after: tuple[float, ...], **more: Any) -> dict[str, Any]:
    """A cell with a narrow row, a stitched path and a wide row."""

    def rows(top1: tuple[float, ...]) -> list[dict[str, Any]]:
        fields = (("r0", 10, None), ("r0+r1", 30, 0), ("r1", 20, None))
        return [{"key": key, "flops": flops, "params": flops, "stitch": stitch, "top1": accuracy}
                for (key, flops, stitch), accuracy in zip(fields, top1, strict=True)]  # fmt: skip

    fixed = {
        "flops": 2e12,
        "step_ms": None,
        "starts": {"count": 1, "cpu_s": 5.0},
        "r2": {"a": 0.5, "b": 0.7},
        "curve": {},
    }
    return {"arm": arm, "seed": seed, "before": rows(before), "rows": rows(after), **fixed, **more}


def test_measures_of_a_cell() -> None:
    """The wide row is the dearest path without a stitch, not the dearest path; what is not measured is absent."""
    found = measures(record("a", 0, (50, 10, 80), (60, 70, 77), curve={100: {"r0": 1.0, "r1": 4.0}}))
    assert (found["narrow_before"], found["narrow"]) == (50, 60)
    assert (found["wide_before"], found["wide"]) == (80, 77)
    assert (found["mean_before"], found["mean"], found["best"]) == (pytest.approx(140 / 3), 69, 77)
    assert (found["mean_100"], found["cost"], found["r2"]) == (2.5, 2.0, pytest.approx(0.6))
    assert not {"mean_500", "mean_2000", "step_ms"} & found.keys()
    unknown = {"flops": None, "starts": {"count": 0, "cpu_s": 0.0}}
    assert not {"cost", "cpu_s"} & measures(record("a", 0, (1, 1, 1), (1, 1, 1), **unknown)).keys()


def test_summary_pairs_seeds() -> None:
    """Seeds that go up and down together: wide means, a narrow difference."""
    records = [record(arm, seed, (1, 1, 1), (10 * seed + plus,) * 3)
               for arm, plus in (("b", 2.0), ("a", 1.0)) for seed in (0, 1, 2)]  # fmt: skip
    found = summary(records, "a")
    assert found["a"]["differences"] == {}
    assert found["b"]["means"]["mean"].half > 20
    pair = found["b"]["differences"]["mean"]
    assert (pair.mean, pair.half, pair.count) == (pytest.approx(1), pytest.approx(0, abs=1e-9), 3)


def test_fits_of_layers() -> None:
    """Paths that share a layer are averaged in each seed, then seeds."""
    rows = [{"key": key, "stitch": stitch} for key, stitch in (("a", 0), ("b", 0), ("c", 1), ("r", None))]
    records = [{"arm": "x", "rows": rows, "r2": {"a": fit, "b": fit + 0.2, "c": -1.0}} for fit in (0.1, 0.3)]
    found = layer_fits(records)["x"]
    assert [found[layer].mean for layer in (0, 1)] == [pytest.approx(0.3), -1.0] and found[1].half == 0


@pytest.mark.parametrize(("after", "passes"), [
    ((61, 70, 80), True), ((60, 71, 80), False), ((61, 75, 79.9), False), ((61, 20, 81), False),
])  # fmt: skip
def test_verdict_needs_all_three(after: tuple[float, ...], passes: bool) -> None:
    """Narrow row better than before, wide row no worse, all paths at least the reference's 70."""
    records = [record("reference", seed, (60, 10, 80), (65, 69, 76)) for seed in (0, 1)]
    records += [record("arm", seed, (60, 10, 80), after) for seed in (0, 1)]
    found = verdicts(records, "reference")
    assert found["arm"]["passes"] is passes and found["reference"]["passes"] is False
    assert found["reference"]["wide"].mean == -4
