"""Questions, variants, trials and their statistics; nothing is trained here."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import has
from scipy import stats

from lgp_dist.cli import COMMANDS, GROUPS
from lgp_dist.cli.parse import parse
from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import FinetuneConfig, RunConfig
from lgp_dist.config.systems import one_path_a_step
from lgp_dist.errors import UserError
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import RECIPES, pool12, snnet_tiny, sws_tiny, tiny, tiny_paper
from lgp_dist.run.checks import check_config
from lgp_dist.run.linked_stages import link_stages
from lgp_dist.study.questions import QUESTIONS, systems, with_variants
from lgp_dist.study.results import layer_fits, measures, row_checks, summary
from lgp_dist.study.settings import arguments, changed_values, with_values
from lgp_dist.study.statistics import T_95, difference, estimate
from lgp_dist.study.trials import Trial, donor_of, shared_stages, trials_of

VARIANTS = [(name, variant) for name, question in QUESTIONS.items() for variant in question.variants]
SHARED = {"stitch_init": 2, "rows": 3, "policy": 3, "instances": 1, "ancestry": 0, "directions": 2}
"""Number of stages that all variants of a question share."""


@cache
def trials(question: str, out: str = "out", base: RunConfig | None = None) -> list[Trial]:
    """Not to be changed: each question's are made once, since finding equal costs takes a second."""
    return trials_of(QUESTIONS[question], base or tiny(), (0, 1), Path(out))


@pytest.mark.slow
@pytest.mark.parametrize("base", [tiny, pool12], ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize(("question", "variant"), VARIANTS, ids=lambda value: getattr(value, "name", value))
def test_a_variant_is_a_command_that_a_person_can_type(question: str, variant: Any, base: Any) -> None:
    """Its options, read by the command line's own parser, give its configuration, which the checks accept."""
    started = replace(base(), run_dir="some where/else", trackers=())
    found = next(trial for trial in trials(question, base=started) if trial.variant == variant and trial.seed == 1)
    check_config(found.config)
    read = parse(["run", *arguments(found.config)], COMMANDS, GROUPS).arguments
    assert read == found.config
    assert read.run_dir == f"out/{variant.name}/seed1" and read.seed == 1


@pytest.mark.parametrize(("question", "count"), SHARED.items())
def test_variants_share_the_stages_before_what_they_change(question: str, count: int) -> None:
    """As many as the table above says, never over seeds, and all variants differ somewhere."""
    found = trials(question)
    first = [trial for trial in found if trial.seed == 0]
    shared = [shared_stages(first[0], trial) for trial in first[1:]]
    assert min(map(len, shared)) == count and all(stages == STAGES[: len(stages)] for stages in shared)
    for trial in found:
        donor, stages = donor_of(trial, found)
        assert len(stages) < len(STAGES)
        assert donor is None or donor.seed == trial.seed and found.index(donor) < found.index(trial)
    assert donor_of(found[0], found) == (None, ())


def test_linked_stages_are_the_same_files_and_whole_or_absent(tmp_path: Path) -> None:
    donor, trial = [each for each in trials("rows", str(tmp_path)) if each.seed == 0][:2]
    for stage in ("ancestry", "distil"):
        (donor.folder / stage).mkdir(parents=True)
        (donor.folder / stage / "artifact.json").write_text(stage)
    (donor.folder / "distil" / "rows.safetensors").write_bytes(b"rows")
    (trial.folder / "ancestry").mkdir(parents=True)
    (trial.folder / "ancestry" / "artifact.json").write_text("its own")
    (trial.folder / ".distil.partial").mkdir()  # of a study that was killed
    link_stages(donor.folder, trial.folder, ("ancestry", "distil", "pool"))
    assert (trial.folder / "ancestry" / "artifact.json").read_text() == "its own"
    assert (trial.folder / "distil" / "rows.safetensors").samefile(donor.folder / "distil" / "rows.safetensors")
    assert sorted(path.name for path in trial.folder.iterdir()) == ["ancestry", "distil"]


def test_the_variants_of_rows_are_what_they_say() -> None:
    found = {variant.name: variant.change(tiny()).finetune for variant in QUESTIONS["rows"].variants}
    own, unit = tiny().finetune, tiny().distil.train.lr
    assert found["recipe"] == own

    def as_long(finetune: FinetuneConfig) -> FinetuneConfig:
        return replace(finetune, train=replace(finetune.train, epochs=own.train.epochs))

    assert found["published"] == as_long(tiny_paper().finetune)
    assert found["one_path"] == as_long(one_path_a_step(tiny()).finetune) == as_long(snnet_tiny().finetune)
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
    assert {name for name, variant in found.items() if variant.train.accumulate == 4} == {
        "four_paths",
        "sandwich",
        "combined",
        "recipe",
    }
    assert {variant.train.batch_size for variant in found.values()} == {own.train.batch_size}
    assert replace(found["sandwich"], sandwich=False) == found["four_paths"]
    again = replace(found["sandwich"], row_lr=own.row_lr, train=replace(found["sandwich"].train, lr=own.train.lr))
    assert again == own


def test_systems_are_recipes_with_the_same_changes() -> None:
    """A setting that a recipe does not have is left out; what it has is set."""
    question = systems(("tiny", "pool18"), "tiny")
    base = replace(tiny(), seed=3, data=replace(tiny().data, root="there", augment=RECIPES["pool12"]().data.augment))
    assert set(changed_values(base)) == {"seed", "data.root", *(f"data.augment.{n}" for n in
        ("crop_scale", "color_jitter", "auto_augment", "random_erase"))}  # fmt: skip
    one, two = (variant.change(base) for variant in question.variants)
    assert one == base
    assert (two.recipe, two.seed, two.data.root, two.model) == ("pool18", 3, "there", RECIPES["pool18"]().model)
    values = {"model.rows.1.heads": 6, "model.rows.7.heads": 1, "no.such": 1}
    assert with_values(two, values, missing="ignore").model.rows[1].heads == 6
    with pytest.raises(UserError, match="model.rows.7.heads"):
        with_values(two, values)


def test_a_variant_that_cannot_be_is_refused_before_the_first_run() -> None:
    with pytest.raises(UserError, match="model.two_way is for pools of stitched rows, but model.stages is set"):
        trials("directions", base=sws_tiny())


@pytest.mark.parametrize("base", [tiny, snnet_tiny], ids=lambda recipe: recipe.__name__)
def test_bins_change_how_often_paths_come(base: Any) -> None:
    """Of two variants that differ in bins alone, on each recipe: rows alone come as often as any bin."""
    shares = {}
    for trial in trials("directions", base=base()):
        sampler = PathSampler.from_config(trial.config, space_of(trial.config))
        shares[trial.variant.name] = {path.key: share for path, share in sampler.shares(1).items()}
    for without, binned in (("both", "both_bins"), ("both_rank", "snnet_v2")):
        assert shares[without] != shares[binned]
        assert shares[binned]["r0.0-5"] == shares[binned]["r1.0-5"] == pytest.approx(1 / 7)


@pytest.mark.parametrize(("seeds", "variants", "pieces"), [
    ((), (), ("--seeds", "each once")),
    ((1, 1), (), ("--seeds is 1 1", "each once")),
    ((0,), ("recipe", "nothing"), ("--variants", "'nothing'", "row_lr")),
])  # fmt: skip
def test_what_a_person_can_put_right(
    seeds: tuple[int, ...], variants: tuple[str, ...], pieces: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        trials_of(with_variants(QUESTIONS["rows"], variants), tiny(), seeds, Path("out"))
    has(str(caught.value), *pieces)


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
    one = trials("rows")[0]
    assert shared_stages(one, one) == STAGES
    assert shared_stages(one, replace(one, sources={file: "other"})) == STAGES[: STAGES.index(before)]


def test_a_run_without_ancestry_shares_nothing_with_one_that_has_it() -> None:
    found = trials("systems")
    alone = next(trial for trial in found if trial.variant.name == "scratch_tiny" and trial.seed == 0)
    assert not alone.config.needs_ancestry and donor_of(alone, found) == (None, ())


def test_scratch_trains_for_the_epochs_of_both_stages() -> None:
    base = tiny()
    short = replace(base.finetune, train=replace(base.finetune.train, epochs=2.0))
    base = replace(base, finetune=short, distil=replace(base.distil, train=replace(base.distil.train, epochs=3.0)))
    epochs = {variant.name: variant.change(base).finetune.train.epochs for variant in QUESTIONS["systems"].variants}
    assert epochs == {"snnet_tiny": 2, "tiny": 2, "sws_tiny": 2, "vanilla_tiny": 2, "scratch_tiny": 5}


def test_rows_are_judged_by_what_they_were() -> None:
    base = replace(tiny(), evaluate=replace(tiny().evaluate, before=False))
    with pytest.raises(UserError) as caught:
        trials("rows", base=base)
    has(str(caught.value), "evaluate.before", "rows")
    assert not any(trial.config.evaluate.before for trial in trials("policy", base=base))


def test_what_was_not_measured_is_left_out() -> None:
    found = record("one", 0, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    left = measures(found).keys() - measures({**found, "before": []}).keys()
    assert left == {"narrow_before", "wide_before", "mean_before"}


def test_chosen_variants_keep_the_reference() -> None:
    assert [variant.name for variant in with_variants(QUESTIONS["rows"], ("row_lr",)).variants] == [
        "published",
        "row_lr",
    ]


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


def record(variant: str, seed: int, before: tuple[float, ...], after: tuple[float, ...], **more: Any) -> dict[str, Any]:
    """A trial with a narrow row, a stitched path and a wide row."""

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
    return {"arm": variant, "seed": seed, "before": rows(before), "rows": rows(after), **fixed, **more}


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
    records = [record(variant, seed, (1, 1, 1), (10 * seed + plus,) * 3)
               for variant, plus in (("b", 2.0), ("a", 1.0)) for seed in (0, 1, 2)]  # fmt: skip
    found = summary(records, "a")
    assert found["a"].differences == {}
    assert found["b"].means["mean"].half > 20
    pair = found["b"].differences["mean"]
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
def test_the_row_check_needs_all_three(after: tuple[float, ...], passes: bool) -> None:
    """Narrow row better than before, wide row no worse, all paths at least the reference's 70."""
    records = [record("reference", seed, (60, 10, 80), (65, 69, 76)) for seed in (0, 1)]
    records += [record("arm", seed, (60, 10, 80), after) for seed in (0, 1)]
    found = row_checks(records, "reference")
    assert found["arm"].passes is passes and found["reference"].passes is False
    assert found["reference"].wide.mean == -4
