"""The path rule, its keys and its costs, against an enumeration of windows and the published tables."""

import csv
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path as File
from typing import Any

import pytest

from lgp_dist.errors import UserError
from lgp_dist.paths.path import Path, Segment
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.paths.stratified import flops_bins
from lgp_dist.recipes import pool12, pool18, snnet_v2_b_l, snnet_v2_s_l, tiny

POOL12, POOL18 = PathSpace((192, 768), 6), PathSpace((192, 768), 9)
SNNET = PathSpace((192, 384, 768), 12)
FIXTURES = File(__file__).parents[1] / "fixtures"
SHAPES = [
    ((32,), 3),
    ((32, 96), 2),
    ((32, 96), 3),
    ((192, 768), 6),
    ((192, 768), 9),
    ((192, 384, 768), 12),
    ((8, 16, 32, 64), 5),
]

TABLE_1 = {6: (3.05, 0.64), 5: (10.38, 2.03), 4: (17.02, 3.38), 3: (23.66, 4.73), 2: (30.31, 6.09), 1: (36.95, 7.44)}
"""Paper, pool(12): low blocks to (M parameters, G FLOPs); high blocks are 6 - low. Row 0 is WIDE_12."""
WIDE_12 = (44.04, 8.85)
TABLE_2 = {
    9: (4.38, 0.95),
    8: (11.71, 2.33),
    7: (18.36, 3.69),
    6: (25.00, 5.04),
    5: (31.64, 6.39),
    4: (38.29, 7.75),
    3: (44.93, 9.10),
    2: (51.57, 10.45),
    1: (58.21, 11.80),
}
"""Paper, pool(18), in the same way; its last row, 65.30 M and 13.26 G, has a test of its own."""
TABLE_5 = [
    (POOL12, 6, 1, 10.82, 2.13),
    (POOL12, 5, 2, 17.47, 3.48),
    (POOL18, 9, 1, 12.16, 2.44),
    (POOL18, 8, 2, 18.80, 3.79),
]
"""Paper's rows of L + 1 blocks: pool, low, high, M parameters, G FLOPs."""
FINAL_NORM = 5 * 197 * 768
"""FLOPs of the wide row's final norm, which the authors' code skips on stitched paths and this project applies."""


def first_windows(depth: int) -> dict[tuple[int, int], int]:
    """For each pair (j, k) the first window (i, i + 1) that holds both, by going through all windows."""
    found: dict[tuple[int, int], int] = {}
    for window, blocks in enumerate(pairwise(range(depth))):
        for pair in product(blocks, repeat=2):
            found.setdefault(pair, window)
    return found


def blocks_of(path: Path) -> tuple[int, ...]:
    """Number of blocks of each segment."""
    return tuple(part.stop - part.start for part in path.segments)


def path_of(space: PathSpace, low: int, high: int) -> Path:
    """The stitched path of a two-row pool with that many blocks."""
    return space.by_key(f"r0.0-{low - 1}+r1.{space.depth - high}-{space.depth - 1}")


def millions(value: int) -> float:
    """As the tables print it."""
    return round(value / 1e6, 2)


def billions(value: int) -> float:
    """As the tables print it."""
    return round(value / 1e9, 2)


@pytest.mark.parametrize(("widths", "depth"), SHAPES)
def test_paths_are_those_of_the_windows(widths: tuple[int, ...], depth: int) -> None:
    """Rows alone first, then for each pair of rows exactly the windows' pairs, each with its window's stitch layer."""
    space = PathSpace(widths, depth)
    alone, stitched = space.paths[: len(widths)], space.paths[len(widths) :]
    assert [path.segments for path in alone] == [(Segment(row, 0, depth),) for row in range(len(widths))]
    assert all(path.is_row for path in alone)
    expected = {
        (Segment(row, 0, j + 1), Segment(row + 1, k, depth)): row * (depth - 1) + window
        for row in range(len(widths) - 1)
        for (j, k), window in first_windows(depth).items()
    }
    assert {path.segments: path.stitches for path in stitched} == {ends: (i,) for ends, i in expected.items()}
    assert len(stitched) == len(expected) == (len(widths) - 1) * (3 * depth - 2)
    assert [path.stitches for path in stitched] == sorted(path.stitches for path in stitched)
    assert set(expected.values()) == set(range(len(space.stitch_widths)))


@pytest.mark.parametrize(("widths", "depth"), SHAPES[1:])
def test_stitched_paths_have_about_as_many_blocks_as_a_row(widths: tuple[int, ...], depth: int) -> None:
    """Low and high blocks add up to L, L + 1 or L + 2, every sum that a window allows occurs, and neither is empty."""
    stitched = [path for path in PathSpace(widths, depth).paths if not path.is_row]
    assert {sum(blocks_of(path)) for path in stitched} == {depth, depth + 1, depth + 2}
    assert {count for path in stitched for count in blocks_of(path)} == set(range(1, depth + 1))


@pytest.mark.parametrize(
    ("space", "paths", "stitches", "stored"),
    [(POOL12, 18, 5, 47.83), (POOL18, 27, 8, 70.87), (SNNET, 71, 22, 118.40)],
)
def test_published_pools(space: PathSpace, paths: int, stitches: int, stored: float) -> None:
    """METHOD's and the papers' numbers of paths, stitch layers and stored parameters."""
    assert len(space.paths) == paths
    assert len(space.stitch_widths) == stitches
    assert millions(space.stored_params) == stored


def published_v2() -> list[tuple[int, int]]:
    """SN-Net v2's number and FLOPs of every path, from its authors' results of DeiT-3 S and L."""
    with (FIXTURES / "snnet_v2_s_l.csv").open() as file:
        return [(int(line["cfg_id"]), int(line["flops"])) for line in csv.DictReader(file)]


def test_published_paths_in_both_directions() -> None:
    """SN-Net v2's 134 paths of DeiT-3 S and L in its order and under its numbers, each with its published FLOPs."""
    space = PathSpace.from_config(snnet_v2_s_l())
    found = [(row["cfg_id"], row["flops"]) for row in map(space.describe, space.paths)]
    assert found == published_v2() and len(found) == 134
    assert len(PathSpace.from_config(snnet_v2_b_l()).paths) == 134
    assert len({path.key for path in space.paths}) == 134
    visits = [tuple(part.row for part in path.segments) for path in space.paths]
    counts = {(0,): 1, (1,): 1, (0, 1): 11, (1, 0): 11, (1, 0, 1): 55, (0, 1, 0): 55}
    assert Counter(visits) == counts
    bins = flops_bins([flops for _, flops in found], 1e9)
    assert len(bins) == 13 and bins[0] == [0] and bins[-1] == [1]
    assert sorted(index for each in bins for index in each) == list(range(134))


@pytest.mark.parametrize("depths", [(3, 3), (2, 6), (4, 8)])
def test_two_way_paths_keep_their_position(depths: tuple[int, int]) -> None:
    """Whatever a path does, it runs the share of the narrow row's blocks and of the wide row's that is left, and one
    stitch layer of its own position and direction stands between two segments."""
    space = PathSpace((32, 96), depths[0], row_depths=depths, two_way=True)
    group, layers = depths[1] // depths[0], depths[0] - 1
    assert space.stitch_widths == ((32, 96),) * layers + ((96, 32),) * layers
    for path in space.paths:
        place = 0
        for number, part in enumerate(path.segments):
            size = group if part.row else 1
            assert part.start == place * size and part.stop % size == 0 and part.stop > part.start
            if number:
                assert path.stitches[number - 1] == (place - 1 if part.row else layers + place - 1)
            place = part.stop // size
        assert place == depths[0] and len(path.stitches) == len(path.segments) - 1
    used = {index for path in space.paths for index in path.stitches}
    assert used == set(range(2 * layers))


@pytest.mark.parametrize(
    "space",
    [
        *(POOL12, SNNET, PathSpace((32, 96), 2, row_depths=(2, 6)), PathSpace((32, 64, 96), 3, stitch_sharing="path")),
        *(PathSpace((32, 96), 3, two_way=True), PathSpace((32, 96), 3, row_depths=(3, 6), two_way=True)),
    ],
)
def test_one_order_holds_every_path(space: PathSpace) -> None:
    """Every block and stitch layer once, and each path's own in the order in which it runs them."""
    blocks = {(row, block) for row, depth in enumerate(space.depths) for block in range(depth)}
    assert len(space.unit_order) == len(set(space.unit_order))
    assert set(space.unit_order) == blocks | set(range(len(space.stitch_widths)))
    for path in space.paths:
        own: list[tuple[int, int] | int] = []
        for number, part in enumerate(path.segments):
            own += [path.stitches[number - 1]] if number else []
            own += [(part.row, block) for block in range(part.start, part.stop)]
        places = [space.unit_order.index(unit) for unit in own]
        assert places == sorted(places)


def test_a_deeper_row_is_entered_in_proportion() -> None:
    """Rows of 2 and 6 blocks: every second window pair, scaled by three."""
    space = PathSpace((32, 96), 2, row_depths=(2, 6))
    assert [path.key for path in space.paths] == [
        *("r0.0-1", "r1.0-5"),
        *("r0.0-0+r1.0-5", "r0.0-0+r1.3-5", "r0.0-1+r1.0-5", "r0.0-1+r1.3-5"),
    ]


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        (
            {"row_depths": (4, 6)},
            ["model.rows.1 has 6 blocks", "multiple of the 4 of row 0", "model.rows.1.depth to 8"],
        ),
        ({"row_depths": (1, 6)}, ["model.rows.0.depth is 1", "2 blocks or more"]),
        ({"widths": (1, 2, 3), "two_way": True}, ["model.two_way joins two rows", "has 3"]),
        ({"two_way": True, "stitch_sharing": "path"}, ["model.two_way", "set model.stitch_sharing to window"]),
    ],
)
def test_pools_that_cannot_be_stitched_are_refused(shape: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        PathSpace(**{"widths": (32, 96), "depth": 4, **shape})
    assert all(piece in str(caught.value) for piece in pieces)


def test_a_stitch_layer_for_each_path() -> None:
    """The same paths in the same order; 3L - 2 layers for each pair of rows, none crossed by two paths."""
    shared = PathSpace((192, 384, 768), 6)
    own = replace(shared, stitch_sharing="path")
    assert [path.key for path in own.paths] == [path.key for path in shared.paths]
    stitches = [path.stitches for path in own.paths if not path.is_row]
    assert stitches == [(index,) for index in range(2 * 16)] and len(own.stitch_widths) == 32
    ends = [(own.widths[path.first_row], own.widths[path.last_row]) for path in own.paths[3:]]
    assert [own.stitch_widths[path.stitches[0]] for path in own.paths[3:]] == ends
    assert own.stored_params - shared.stored_params == 11 * (193 * 384 + 385 * 768)
    assert [own.cost(path) for path in own.paths] == [shared.cost(path) for path in shared.paths]


def test_method_table_of_pool12() -> None:
    """METHOD's nine pairs of paper parameters and FLOPs, to the printed digit, in rows alone and paths of L and L+1."""
    params = [3.05, 10.38, 10.82, 17.02, 17.47, 23.66, 30.31, 36.95, 44.04]
    flops = [0.64, 2.03, 2.13, 3.38, 3.48, 4.73, 6.09, 7.44, 8.85]
    ends = [(5, 1), (6, 1), (4, 2), (5, 2), (3, 3), (2, 4), (1, 5)]
    paths = [POOL12.paths[0], *(path_of(POOL12, low, high) for low, high in ends), POOL12.paths[1]]
    costs = [POOL12.cost(path) for path in paths]
    assert [millions(cost.params_paper) for cost in costs] == params
    assert [billions(cost.flops) for cost in costs] == flops


@pytest.mark.parametrize(("space", "table"), [(POOL12, TABLE_1), (POOL18, TABLE_2)])
def test_papers_paths_of_l_blocks(space: PathSpace, table: dict[int, tuple[float, float]]) -> None:
    """Tables 1 and 2 to the printed digit; on stitched paths the paper's FLOPs lack the final norm."""
    for low, (params, flops) in table.items():
        alone = low == space.depth
        cost = space.cost(space.paths[0] if alone else path_of(space, low, space.depth - low))
        assert millions(cost.params_paper) == params
        assert billions(cost.flops - (0 if alone else FINAL_NORM)) == flops
        assert abs(cost.flops / 1e9 - flops) < 0.006


@pytest.mark.parametrize(("space", "low", "high", "params", "flops"), TABLE_5)
def test_papers_paths_of_l_plus_1_blocks(space: PathSpace, low: int, high: int, params: float, flops: float) -> None:
    """Table 5's rows that are in neither Table 1 nor 2."""
    cost = space.cost(path_of(space, low, high))
    assert (millions(cost.params_paper), billions(cost.flops)) == (params, flops)


def test_papers_wide_rows() -> None:
    """Table 1's wide row agrees; Table 2's FLOPs of `0 | 9` are those of the path with one narrow block before it."""
    wide12, wide18 = POOL12.cost(POOL12.paths[1]), POOL18.cost(POOL18.paths[1])
    assert (millions(wide12.params_paper), billions(wide12.flops)) == WIDE_12
    assert (millions(wide18.params_paper), billions(wide18.flops)) == (65.30, 13.22)
    longer = POOL18.cost(path_of(POOL18, 1, 9))
    assert (millions(longer.params_paper), billions(longer.flops)) == (65.30, 13.26)


def test_every_path_of_sn_net_has_the_counts_of_its_released_results() -> None:
    """All 71 (FLOPs, parameters), in the order of cfg_id: without the final norm all agree, with it rows alone."""
    released = json.loads((FIXTURES / "snnet_deit.json").read_text())["paths"]
    assert [row["cfg_id"] for row in released] == list(range(71))
    without = replace(SNNET, final_norm=False)
    for space in (without, SNNET):
        rows = [space.describe(path) for path in space.paths]
        found = [{"cfg_id": row["cfg_id"], "flops": row["flops"], "params": row["params_paper"]} for row in rows]
        same = [ours == theirs for ours, theirs in zip(found, released, strict=True)]
        assert same == [path.is_row or space is without for path in space.paths]
    assert millions(without.stored_params) == 118.40


@pytest.mark.parametrize(("widths", "depth"), SHAPES)
def test_cost_is_the_sum_of_its_parts(widths: tuple[int, ...], depth: int) -> None:
    """One more block costs the same everywhere in a row; the paper's count lacks a stitched path's embeddings only."""
    space = PathSpace(widths, depth)
    for path in space.paths:
        cost = space.cost(path)
        embeddings = (1 + 197) * widths[path.first_row] if not path.is_row else 0
        assert cost.params - cost.params_paper == embeddings
        if path.is_row or blocks_of(path)[0] == depth:
            continue
        low, high = path.segments
        longer = Path((Segment(low.row, 0, low.stop + 1), high), path.stitches)
        width = widths[low.row]
        assert space.cost(longer).params - cost.params == 12 * width**2 + 13 * width
        assert space.cost(longer).flops - cost.flops == 197 * (12 * width**2 + 2 * 197 * width + 10 * width)


@pytest.mark.parametrize(("widths", "depth"), SHAPES)
def test_keys_are_unique_and_lead_back(widths: tuple[int, ...], depth: int) -> None:
    """A key names one path, and says which blocks run."""
    space = PathSpace(widths, depth)
    keys = [path.key for path in space.paths]
    assert len(set(keys)) == len(keys)
    assert [space.by_key(key) for key in keys] == list(space.paths)
    for path in space.paths:
        parts = [part.removeprefix("r").split(".") for part in path.key.split("+")]
        ends = [(int(row), *map(int, blocks.split("-"))) for row, blocks in parts]
        assert ends == [(part.row, part.start, part.stop - 1) for part in path.segments]


def test_keys_as_documented() -> None:
    """The two examples of the class's text."""
    assert Path((Segment(0, 0, 4), Segment(1, 4, 6)), (3,)).key == "r0.0-3+r1.4-5"
    assert POOL12.by_key("r0.0-3+r1.4-5") == Path((Segment(0, 0, 4), Segment(1, 4, 6)), (3,))
    assert POOL12.by_key("r0.0-5") == POOL12.paths[0]


@pytest.mark.parametrize("key", ["", "r0.0-3+r1.6-5", "r0.0-0+r1.2-5", "r0.0-8", "r2.0-5", "r1.0-5+r0.0-5", "R0.0-5"])
def test_unknown_key_is_a_sentence(key: str) -> None:
    """A key that the pool lacks is named, with where to find the keys."""
    with pytest.raises(UserError) as caught:
        POOL12.by_key(key)
    assert repr(key) in str(caught.value) and "`lgp paths` lists its 18 keys." in str(caught.value)


def test_blocks_and_rows_of_a_path() -> None:
    """has_block, first_row and last_row agree with the segments, block by block."""
    for path in SNNET.paths:
        on = {(part.row, block) for part in path.segments for block in range(part.start, part.stop)}
        everywhere = set(product(range(3), range(-1, 13)))
        assert {place for place in everywhere if path.has_block(*place)} == on
        assert (path.first_row, path.last_row) == (min(row for row, _ in on), max(row for row, _ in on))


def test_description_of_a_path() -> None:
    """Low and high blocks and rows as in the tables: a row alone has none of the other."""
    found = {path.key: SNNET.describe(path) for path in SNNET.paths}
    assert list(found) == [row["key"] for row in found.values()]

    def place(key: str) -> tuple[object, ...]:
        return tuple(found[key][name] for name in ("low", "high", "low_row", "high_row", "stitch"))

    assert place("r0.0-11") == (12, 0, 0, None, None)
    assert place("r1.0-11") == (12, 0, 1, None, None)
    assert place("r2.0-11") == (0, 12, None, 2, None)
    assert place("r0.0-3+r1.3-11") == (4, 9, 0, 1, 2)
    assert place("r1.0-11+r2.10-11") == (12, 2, 1, 2, 21)
    for path in SNNET.paths:
        row, cost = found[path.key], SNNET.cost(path)
        assert (row["params"], row["params_paper"], row["flops"]) == (cost.params, cost.params_paper, cost.flops)


def test_space_of_a_recipe() -> None:
    """Recipes give the pools of the tables; tiny has 17 tokens of one channel."""
    assert PathSpace.from_config(pool12()) == POOL12
    assert PathSpace.from_config(pool18()) == POOL18
    space = PathSpace.from_config(tiny())
    assert space == PathSpace((32, 96), 6, image_size=28, patch_size=7, channels=1, num_classes=10)
    assert space.tokens == 17 and POOL12.tokens == 197
    assert SNNET.stitch_widths == ((192, 384),) * 11 + ((384, 768),) * 11


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"depth": 1}, ("model.depth is 1", "from 2 to")),
        ({"depth": 0}, ("model.depth is 0", "from 2 to")),
        ({"widths": (768, 192)}, ("[768, 192]", "narrow to wide")),
        ({"image_size": 230}, ("data.image_size 230", "model.patch_size 16")),
        ({"patch_size": 15}, ("data.image_size 224", "model.patch_size 15")),
    ],
)
def test_bad_shape_is_a_sentence(shape: dict[str, object], words: tuple[str, ...]) -> None:
    """A shape that cannot be built is refused before any tensor exists, naming field and value."""
    with pytest.raises(UserError) as caught:
        PathSpace(**{"widths": (192, 768), "depth": 6, **shape})
    assert all(word in str(caught.value) for word in words)
