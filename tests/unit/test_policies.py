"""Shares, spread, equal work, weights, sandwich and subsets: what a schedule promises under each policy."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path as File
from typing import Any

import pytest

from lgp_dist.config.flat import stage_settings
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.cost import path_costs
from lgp_dist.paths.path import Path
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import pool12, tiny
from lgp_dist.run.artifacts import RunDirectory
from lgp_dist.run.checks import check_config
from lgp_dist.stages.start import check_stages

POLICIES = ("independent", "shared", "spread", "balanced")
SPACES = {
    "pool12": PathSpace((192, 768), 6),
    "pool18": PathSpace((192, 768), 9),
    "three": PathSpace((192, 384, 768), 12),
}
POOL12 = SPACES["pool12"]


def make(policy: str, accumulate: int = 1, pool: str = "pool12", seed: int = 0, **more: Any) -> PathSampler:
    """A sampler over a pool with FLOPs as costs."""
    paths = SPACES[pool].paths
    costs = tuple(float(SPACES[pool].cost(path).flops) for path in paths)
    return PathSampler(paths, policy, seed, accumulate, costs, **more)


def rows_first(weight: int | Fraction) -> tuple[int | Fraction, ...]:
    """Weights of POOL12's paths in which rows alone have another."""
    return tuple(weight if path.is_row else 1 for path in POOL12.paths)


def chi_square_fits(counts: Counter, shares: dict[Path, float]) -> bool:
    """Whether Pearson's statistic is below five standard deviations above its mean."""
    total, kinds = counts.total(), len(shares)
    assert set(counts) <= set(shares) and sum(shares.values()) == pytest.approx(1)
    statistic = sum((counts[path] - total * share) ** 2 / (total * share) for path, share in shares.items())
    return statistic < (kinds - 1) + 5 * (2 * (kinds - 1)) ** 0.5


def efficiency(sampler: PathSampler, world: int, steps: int) -> float:
    """Mean over largest work of ranks, both added up over steps, from POOL's FLOPs."""
    cost = dict(zip(sampler.paths, sampler.costs, strict=True))
    table = {id(path): cost[path] for path in sampler.paths}
    mean = slowest = 0.0
    for step in range(steps):
        plan = sampler.plan(step, world)
        work = [sum(table[id(row[rank])] for row in plan) for rank in range(world)]
        mean, slowest = mean + sum(work) / world, slowest + max(work)
    return mean / slowest


# Purity


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sandwich", [False, True])
def test_plans_are_pure(policy: str, sandwich: bool) -> None:
    """A fresh sampler, another order, a deep copy and single draws give the same paths, cache or none."""
    one, two = (make(policy, 4, weights=rows_first(2), sandwich=sandwich) for _ in range(2))
    steps = [(step, world) for step in range(12) for world in (2, 3)]
    forward = {place: one.plan(*place) for place in steps}
    backward = {place: two.plan(*place) for place in reversed(steps)}
    twin = copy.deepcopy(one)
    assert forward == backward == {place: twin.plan(*place) for place in steps}
    assert one == two == twin and hash(one) == hash(two) == hash(twin)
    for (step, world), plan in forward.items():
        drawn = [[two.draw(step, micro, rank, world) for rank in range(world)] for micro in range(4)]
        assert [list(row) for row in plan] == drawn


def test_the_last_plans_are_remembered() -> None:
    """Every rank's draw of a step comes from one plan, and a long run keeps a few of them only."""
    sampler = make("balanced", 2)
    assert sampler.plan(0, 4) is sampler.plan(0, 4)
    plans = [sampler.plan(step, 4) for step in range(50)]
    assert sampler.plan(49, 4) is plans[49] and sampler.plan(0, 4) is not plans[0] and sampler.plan(0, 4) == plans[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_of_one_path(policy: str) -> None:
    """A single path is drawn everywhere, whatever the policy."""
    sampler = PathSampler(POOL12.paths[:1], policy, 0, 3, (2.0,))
    assert {path for row in sampler.plan(4, 5) for path in row} == {POOL12.paths[0]}
    assert sampler.shares(5) == {POOL12.paths[0]: 1.0}


PRINT = """
import sys; from lgp_dist.paths.stitched import PathSpace; from lgp_dist.paths.sampler import PathSampler
space = PathSpace((192, 768), 6); costs = tuple(float(space.cost(path).flops) for path in space.paths)
for policy in ("independent", "shared", "spread", "balanced"):
    sampler = PathSampler(space.paths, policy, 0, 3, costs)
    for step in range(9):
        for row in sampler.plan(step, 5):
            sys.stdout.write(" ".join(path.key for path in row) + "\\n")
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_plans_are_the_same_in_every_process(hash_seed: str) -> None:
    """Another process with another hash seed makes the same plans."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, env=environment)
    samplers = [make(policy, 3) for policy in POLICIES]
    rows = [row for sampler in samplers for step in range(9) for row in sampler.plan(step, 5)]
    assert done.stdout.splitlines() == [" ".join(path.key for path in row) for row in rows]


@pytest.mark.parametrize(("policy", "pinned"), [("spread", "67932de730838e7d"), ("balanced", "adaca665011c4478")])
def test_plans_stay_as_they_are(policy: str, pinned: str) -> None:
    """Pinned plans: a change here breaks every restart."""
    sampler = make(policy, 2)
    keys = "\n".join(path.key for step in range(50) for row in sampler.plan(step, 4) for path in row)
    assert hashlib.sha256(keys.encode()).hexdigest()[:16] == pinned


@pytest.mark.parametrize("policy", POLICIES)
def test_another_seed_or_step_gives_another_plan(policy: str) -> None:
    sampler, other = make(policy, 2), make(policy, 2, seed=1)
    plans = [each.plan(step, 8) for each in (sampler, other) for step in range(20)]
    assert len(set(plans)) > 36


@pytest.mark.parametrize("policy", POLICIES)
def test_the_schedule_goes_on_at_another_world_size(policy: str) -> None:
    """After a restart on 3 ranks instead of 4 the steps are those of 3 ranks from the beginning: nothing is carried."""
    whole, first, second = make(policy, 2), make(policy, 2), make(policy, 2)
    before = [first.plan(step, 4) for step in range(5)]
    after = [second.plan(step, 3) for step in range(5, 10)]
    assert before == [whole.plan(step, 4) for step in range(5)]
    assert after == [whole.plan(step, 3) for step in range(5, 10)]


@pytest.mark.parametrize("policy", ["spread", "balanced"])
def test_places_outside_a_step(policy: str) -> None:
    """A rank or micro-step that does not exist is a bug of the caller."""
    with pytest.raises(ValueError, match="rank 2 is outside a world of 2"):
        make(policy, 2).draw(0, 0, 2, 2)
    with pytest.raises(ValueError, match="micro-step 2 is outside a step of 2"):
        make(policy, 2).draw(0, 2, 0, 2)


def test_costs_and_weights_fit_the_paths() -> None:
    for more in (
        {"costs": (1.0,)},
        {"costs": (1.0,) * 18, "weights": (1,)},
        {"costs": (1.0,) * 18, "weights": (0,) * 18},
    ):
        with pytest.raises(ValueError, match="18 paths"):
            PathSampler(POOL12.paths, "balanced", 0, **more)


# Shares


SETTINGS = [
    (policy, micros, setting) for policy in POLICIES for micros in (1, 2, 3) for setting in ("equal", "weights")
]
SETTINGS += [("independent", 1, "sandwich"), ("independent", 3, "sandwich"), ("shared", 3, "sandwich")]
SETTINGS += [("spread", 1, "sandwich"), ("spread", 3, "sandwich"), ("balanced", 4, "sandwich"), ("balanced", 3, "meet")]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "accumulate", "setting"), SETTINGS)
def test_long_run_shares(policy: str, accumulate: int, setting: str) -> None:
    """Every path has its share in every single slot of a step, and so on every rank and over all."""
    more = {"equal": {}, "weights": {"weights": rows_first(Fraction(5, 2))}, "sandwich": {"sandwich": True}}.get(
        setting, {}
    )
    more = {"meet": "micro_step"} if setting == "meet" else more
    sampler, world, steps = make(policy, accumulate, seed=3, **more), 3, 2500
    sampler.check(world)
    slots = accumulate * (1 if policy == "shared" else world)
    row = {"weights": 2.5 / 21, "sandwich": max(1 / slots, 1 / 18)}.get(setting, 1 / 18)
    shares = {path: row if path.is_row else (1 - 2 * row) / 16 for path in sampler.paths}
    assert sampler.shares(world) == pytest.approx(shares)
    plans = [sampler.plan(step, world) for step in range(steps)]
    for micro in range(accumulate):
        for rank in range(world):
            assert chi_square_fits(Counter(plan[micro][rank] for plan in plans), shares), (micro, rank)
    if policy in ("spread", "balanced"):
        everywhere = Counter(path for plan in plans for line in plan for path in line)
        assert all(abs(everywhere[path] / everywhere.total() - share) < 0.012 for path, share in shares.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pool", SPACES)
def test_paths_of_all_lengths_appear(policy: str, pool: str) -> None:
    """Stitched paths of L, L + 1 and L + 2 blocks, rows alone, and in the end every path."""
    space, sampler = SPACES[pool], make(policy, 2, pool)
    steps = range(40 if pool != "three" else 120)
    drawn = {path for step in steps for row in sampler.plan(step, 4) for path in row}
    stitched = {sum(part.stop - part.start for part in path.segments) for path in drawn if not path.is_row}
    assert stitched == {space.depth, space.depth + 1, space.depth + 2}
    more = range(120 if policy != "shared" else 400)
    assert drawn | {path for step in more for row in sampler.plan(step, 16) for path in row} == set(space.paths)


# Spread


@pytest.mark.parametrize("pool", SPACES)
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 2), (8, 8), (64, 1), (100, 3)])
def test_spread_repeats_none_until_all_are_drawn(pool: str, world: int, accumulate: int) -> None:
    """In each step every path comes slots / paths times, rounded down or up."""
    sampler = make("spread", accumulate, pool)
    paths, slots = len(sampler.paths), world * accumulate
    for step in range(30):
        counts = Counter(path for row in sampler.plan(step, world) for path in row)
        assert counts.total() == slots
        assert {counts[path] for path in sampler.paths} <= {slots // paths, -(-slots // paths)}


# Balanced


@pytest.mark.slow
@pytest.mark.parametrize("pool", SPACES)
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("world", [2, 3, 8, 64, 1024])
def test_balanced_work_is_equal(pool: str, accumulate: int, world: int) -> None:
    """At least 0.97 of the ranks' time is work, counting the path's cost alone."""
    sampler = make("balanced", accumulate, pool)
    assert efficiency(sampler, world, 12 if world == 1024 else 120) >= 0.97


@pytest.mark.parametrize("pool", ["pool12", "pool18"])
@pytest.mark.parametrize("world", [2, 64])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_balanced_work_is_equal_in_every_micro_step(pool: str, accumulate: int, world: int) -> None:
    """Where ranks meet in every micro-step (ZeRO-2, ZeRO-3); pairs, which meet once in a step, are far from it."""

    def each_micro_step(meet: str) -> float:
        sampler, mean, slowest = make("balanced", accumulate, pool, meet=meet), 0.0, 0.0
        for step in range(200):
            for row in sampler.schedule(step, world):
                work = [sampler.costs[index] for index in row]
                mean, slowest = mean + sum(work) / world, slowest + max(work)
        return mean / slowest

    assert each_micro_step("micro_step") >= 0.97
    assert each_micro_step("step") < 0.9


@pytest.mark.parametrize(("pool", "known"), [("pool12", 0.60), ("pool18", 0.58)])
def test_independent_work_is_not(pool: str, known: float) -> None:
    """METHOD, section 5: what independent draws of 64 ranks leave of the machines' time."""
    assert efficiency(make("independent", 1, pool), 64, 600) == pytest.approx(known, abs=0.01)


@pytest.mark.parametrize("pool", ["pool12", "pool18"])
def test_balanced_pairs_see_the_whole_pool(pool: str) -> None:
    """With two micro-steps and as many slots as paths, or more, a step trains (nearly) all of them."""
    sampler = make("balanced", 2, pool)
    seen = [len({path for row in sampler.plan(step, 32) for path in row}) for step in range(40)]
    assert min(seen) == len(sampler.paths)


def test_balanced_alone_is_spread() -> None:
    """One rank waits for none: it sees as many paths as it can."""
    balanced, spread = make("balanced", 8, "three"), make("spread", 8, "three")
    assert [balanced.plan(step, 1) for step in range(20)] == [spread.plan(step, 1) for step in range(20)]


def test_balanced_follows_the_costs_it_is_given() -> None:
    """Equal costs leave nothing to balance, so that one micro-step sees all paths; FLOPs would allow a few."""
    equal = replace(make("balanced"), costs=(1.0,) * 18)
    assert len(set(equal.plan(0, 64)[0])) == 18
    assert len(set(make("balanced").plan(0, 64)[0])) < 5


# Sandwich


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pool", ["pool12", "pool18"])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (3, 4), (16, 2), (64, 4)])
def test_sandwich_has_both_rows_in_every_step(policy: str, pool: str, world: int, accumulate: int) -> None:
    sampler = make(policy, accumulate, pool, sandwich=True)
    if (policy, accumulate) == ("shared", 2) or (policy, world) == ("balanced", 2):
        with pytest.raises(UserError, match="finetune.sandwich"):
            sampler.check(world)
        return
    sampler.check(world)
    rows = {path for path in sampler.paths if path.is_row}
    for step in range(60):
        assert rows <= {path for row in sampler.plan(step, world) for path in row}
    if policy == "balanced" and world > 1:
        assert efficiency(sampler, world, 60) >= 0.97


@pytest.mark.parametrize("policy", ["independent", "spread"])
def test_sandwich_of_three_rows(policy: str) -> None:
    sampler = make(policy, 2, "three", sandwich=True)
    sampler.check(3)
    rows = set(sampler.paths[:3])
    assert all(rows <= {path for row in sampler.plan(step, 3) for path in row} for step in range(60))


@pytest.mark.parametrize(
    ("policy", "pool", "accumulate", "world"),
    [
        ("spread", "pool12", 1, 1),
        ("independent", "pool12", 2, 1),
        ("shared", "pool12", 2, 64),
        ("spread", "three", 1, 3),
        ("balanced", "pool12", 1, 8),
        ("balanced", "pool12", 3, 2),
        ("balanced", "three", 2, 4),
    ],
)
def test_sandwich_that_cannot_hold(policy: str, pool: str, accumulate: int, world: int) -> None:
    """Too few slots, or work that would differ: one sentence that names the settings."""
    with pytest.raises(UserError, match="^finetune.sandwich .*finetune.train.accumulate.*[.]$"):
        make(policy, accumulate, pool, sandwich=True).check(world)


# From a configuration


def with_finetune(config: RunConfig, accumulate: int = 1, **changes: Any) -> RunConfig:
    train = replace(config.finetune.train, accumulate=accumulate)
    return replace(config, finetune=replace(config.finetune, train=train, **changes))


def from_config(config: RunConfig) -> PathSampler:
    check_config(config)
    return PathSampler.from_config(config, PathSpace.from_config(config))


@pytest.mark.parametrize(
    ("policy", "sandwich"), [*((policy, False) for policy in POLICIES), ("independent", True), ("spread", True)]
)
def test_the_widest_row_leads_every_group(policy: str, sandwich: bool) -> None:
    """On every rank the first of three micro-steps is the widest row; no other is; the others come as shares say."""
    sampler, world, steps = make(policy, 6, sandwich=sandwich, lead_every=3), 4, 1500
    sampler.check(world)
    lead = max((path for path in sampler.paths if path.is_row), key=lambda path: path.last_row)
    counts: Counter = Counter()
    for step in range(steps):
        for micro, drawn in enumerate(sampler.plan(step, world)):
            assert [path == lead for path in drawn] == [micro % 3 == 0] * world
            assert drawn == tuple(sampler.draw(step, micro, rank, world) for rank in range(world))
            counts.update(drawn)
    shares = sampler.shares(world)
    assert shares[lead] == 1 / 3 and counts[lead] == counts.total() / 3
    others = {path: share / (2 / 3) for path, share in shares.items() if path != lead}
    if policy == "independent":
        assert chi_square_fits(Counter({path: counts[path] for path in others}), others)
    for path, share in others.items():
        expected = share * counts.total() * 2 / 3
        assert abs(counts[path] - expected) < 6 * (expected * sampler.tied_slots(world)) ** 0.5
    if sandwich:
        rows = {path for path in sampler.paths if path.is_row}
        plans = [sampler.plan(step, world) for step in range(200)]
        assert all(rows <= {path for drawn in plan for path in drawn} for plan in plans)


def test_the_default_is_what_it_was() -> None:
    """Without new settings: all paths, equal shares, the draws that are pinned in test_sampler."""
    sampler, config = from_config(pool12()), pool12()
    assert (sampler.paths, sampler.policy, sampler.seed) == (POOL12.paths, "independent", config.seed)
    assert [POOL12.paths.index(sampler.draw(step, 0, 0, 1)) for step in range(8)] == [4, 0, 9, 4, 6, 15, 2, 10]


@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_named_paths_are_drawn(policy: str) -> None:
    keys = ("r1.0-5", "r0.0-5", "r0.0-3+r1.4-5", "r0.0-2+r1.2-5")
    sampler = from_config(with_finetune(pool12(), 2, policy=policy, only=keys))
    drawn = Counter(path.key for step in range(60) for row in sampler.plan(step, 2) for path in row)
    assert set(drawn) == set(keys)
    assert set(sampler.shares(2).values()) == {0.25}


@pytest.mark.parametrize("weight", [0.25, 1.1, 4.0])
def test_row_weight_is_exact(weight: float) -> None:
    shares = from_config(with_finetune(pool12(), row_weight=weight)).shares(4)
    stitched = 1 / (16 + 2 * weight)
    for path, share in shares.items():
        assert share == pytest.approx(stitched * (weight if path.is_row else 1), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"only": ("r0.0-5", "r9.0-5")}, ["finetune.only", "'r9.0-5'", "nearest"]),
        ({"only": ("r0.0-5", "r0.0-5")}, ["finetune.only", "'r0.0-5'", "2 times"]),
        ({"row_weight": 0.0}, ["finetune.row_weight", "0.0"]),
        ({"row_weight": float("nan")}, ["finetune.row_weight", "nan"]),
        ({"row_lr": (1.0,)}, ["finetune.row_lr", "2 factors"]),
        ({"row_lr": (1.0, -0.1)}, ["finetune.row_lr", "-0.1"]),
        ({"row_lr": (float("nan"), 1.0)}, ["finetune.row_lr", "nan"]),
        ({"row_weight": 1e6}, ["finetune.row_weight", "1000000.0"]),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_config(with_finetune(tiny(), **changes))
    assert all(piece in str(error.value) for piece in pieces), error.value


def test_a_schedule_that_cannot_hold_is_refused_before_the_first_stage(tmp_path: File) -> None:
    config = with_finetune(tiny(), sandwich=True)
    check_stages(config, ("finetune",), RunDirectory(tmp_path), 4, 1000)
    with pytest.raises(UserError, match="finetune.sandwich"):
        check_stages(config, ("finetune",), RunDirectory(tmp_path), 2, 1000)
    check_stages(config, ("distil",), RunDirectory(tmp_path), 2, 1000)


# Costs


def test_costs_are_three_times_the_flops() -> None:
    assert path_costs(POOL12) == {path.key: 3 * POOL12.cost(path).flops for path in POOL12.paths}


def test_costs_of_a_file_are_used(tmp_path: File) -> None:
    """Seconds of the file, by key, whatever else it holds."""
    seconds = {path.key: 0.5 + index for index, path in enumerate(POOL12.paths)}
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"costs": {**seconds, "other": 3}, "machine": {}}))
    sampler = from_config(with_finetune(pool12(), policy="balanced", costs=str(file)))
    assert sampler.costs == tuple(seconds.values())


KEYS = ", ".join(f'"{path.key}": 1.0' for path in POOL12.paths)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (None, ["cannot be read", "No such file"]),
        ("{", ["not valid JSON"]),
        ("\ud800", ["not valid JSON"]),
        ("[1]", ["no object `costs`"]),
        ('{"costs": [1]}', ["no object `costs`"]),
        ('{"costs": {"r0.0-5": 1.0}}', ["'r1.0-5'", "17 of 18"]),
        (f'{{"costs": {{{KEYS}, "r0.0-5": 0}}}}', ["costs.r0.0-5 is 0"]),
        (f'{{"costs": {{{KEYS}, "r0.0-5": -1.5}}}}', ["costs.r0.0-5 is -1.5"]),
        (f'{{"costs": {{{KEYS}, "r0.0-5": NaN}}}}', ["costs.r0.0-5 is nan"]),
        (f'{{"costs": {{{KEYS}, "r0.0-5": Infinity}}}}', ["costs.r0.0-5 is inf"]),
        (f'{{"costs": {{{KEYS}, "r0.0-5": "fast"}}}}', ["costs.r0.0-5 is 'fast'"]),
        (f'{{"costs": {{{KEYS}, "r0.0-5": true}}}}', ["costs.r0.0-5 is True"]),
        (f'{{"costs": {{{KEYS}, "r0.0-5": 1{"0" * 400}}}}}', ["costs.r0.0-5 is 1000"]),
    ],
)
def test_costs_that_cannot_be_used(tmp_path: File, text: str | None, pieces: list[str]) -> None:
    """One sentence with the file, what is wrong and the command that makes it."""
    file = tmp_path / "costs.json"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError) as error:
        from_config(with_finetune(pool12(), costs=str(file)))
    sentence = str(error.value)
    assert all(piece in sentence for piece in ["finetune.costs", str(file), *pieces]), sentence
    assert sentence.endswith(".")


def test_costs_count_from_stage_finetune_on(tmp_path: File) -> None:
    """A changed table leaves the stages before valid; shards count for all."""
    sources = {"data.train": "a", "ancestry.weights": "b", "finetune.costs": "c"}
    directory = RunDirectory(tmp_path, stage_settings(tiny()) | sources)
    found = {
        stage: sources.keys() & directory.depends_on(stage).keys()
        for stage in ("ancestry", "pool", "finetune", "export")
    }
    assert found["ancestry"] == found["pool"] == {"data.train", "ancestry.weights"}
    assert found["finetune"] == found["export"] == sources.keys()
