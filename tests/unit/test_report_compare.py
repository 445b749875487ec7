"""`lgp report`: runs and SN-Net's file side by side."""

import json
import shutil
from pathlib import Path

import pytest
from run_helpers import Lgp, has

from lgp_dist.errors import UserError
from lgp_dist.report.compare import System, compare_figure, compare_table, read_snnet, variants_figure
from lgp_dist.report.plots import figure_svg
from lgp_dist.run.text_table import markdown_table

PUBLISHED = [
    {"cfg_id": 0, "flops": 1258411200, "params": 5717416, "acc1": 70.56400227203369},
    {"cfg_id": 1, "flops": 4608338304, "params": 22050664, "acc1": 79.46400268066407},
    {"loss": 0.9, "acc1": 81.93, "acc5": 95.8, "cfg_id": 2, "flops": 17582740224, "params": 86567656},
]
"""Lines as SN-Net's released file and its evaluation write them."""


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_snnet_file(tmp_path: Path) -> None:
    """Counts as they stand, acc1 as top-1, a configuration measured again counts once, empty lines none."""
    again = json.dumps({**PUBLISHED[0], "acc1": 71.0})
    found = read_snnet(write(tmp_path / "stitches_res.txt", *map(json.dumps, PUBLISHED), "", again))
    assert (found.name, found.cost) == ("stitches_res", None)
    assert [(row["key"], row["flops"], row["params"], row["top1"]) for row in found.rows] == [
        ("cfg 0", 1258411200, 5717416, 71.0),
        ("cfg 1", 4608338304, 22050664, 79.46400268066407),
        ("cfg 2", 17582740224, 86567656, 81.93),
    ]


@pytest.mark.parametrize("bad", [
    "{", "[1]", "null", "3", '{"cfg_id": 0, "flops": 1, "params": 1}',
    '{"cfg_id": 0, "flops": "1", "params": 1, "acc1": 1}',
    '{"cfg_id": 0, "flops": NaN, "params": 1, "acc1": 1}', '{"cfg_id": 0, "flops": 1, "params": -1, "acc1": 1}',
    '{"cfg_id": 0, "flops": 1, "params": 1, "acc1": 100.5}', '{"cfg_id": true, "flops": 1, "params": 1, "acc1": 1}',
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    file = write(tmp_path / "results.txt", json.dumps(PUBLISHED[0]), bad)
    with pytest.raises(UserError) as caught:
        read_snnet(file)
    has(str(caught.value), str(file), "line 2", "cfg_id, flops, params and acc1")


def test_a_file_without_results(tmp_path: Path) -> None:
    for file in (write(tmp_path / "empty.txt"), tmp_path / "absent.txt", tmp_path):
        with pytest.raises(UserError) as caught:
            read_snnet(file)
        has(str(caught.value), str(file))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="bytes cannot be read"):
        read_snnet(tmp_path / "bytes")


def test_table_and_figure_hold_every_system() -> None:
    rows = [{"key": k, "params": p, "flops": f, "stitch": s, "top1": t} for k, p, f, s, t in
            (("a", 1e6, 1e9, None, 60.0), ("b", 2e6, 2e9, 0, 55.0), ("c", 3e6, 3e9, None, 80.0))]  # fmt: skip
    bare = [{name: row[name] for name in ("key", "params", "flops", "top1")} for row in rows]
    both = [System.of_paths("pool", rows, 2.5e15), System("one|two", bare, None)]
    lines = [[cell.strip() for cell in line.split(" | ")] for line in compare_table(both).splitlines()]
    assert lines[2] == ["| pool", "3", "1.00 M to 3.00 M", "1.00 G to 3.00 G", "60.00", "80.00", "65.00", "80.00", "2",
                        "2.5e+15 |"]  # fmt: skip
    assert lines[3][0] == "| one\\|two" and lines[3][4:6] == ["-", "-"] and lines[3][-1] == "- |"
    svg = figure_svg(compare_figure(both, title="Two"))
    assert svg == figure_svg(compare_figure(both, title="Two"))
    assert len(compare_figure(both, title="Two").axes) == 3 and len(compare_figure(both[1:], title="One").axes) == 2
    equal, other = (System.of_paths("second", rows, cost) for cost in (2.51e15, 2.6e15))
    panels = [len(compare_figure([both[0], second], title="Equal or not").axes) for second in (equal, other)]
    assert panels == [2, 3], "costs that are equal within 1 % have no panel"


def test_variants_have_a_panel_of_curves_if_there_are_any() -> None:
    found = {name: {"mean": (71.0, 12.7), "wide": (80.0, 0.0)} for name in ("one", "two")}
    (means,) = variants_figure(found, {"one": {}, "two": {}}, title="?").axes
    points = {line.get_ydata()[0] for line in means.lines if line.get_marker() in "os"}
    assert points == {71.0, 80.0}
    _, curves = variants_figure(found, {"one": {0: 50.0, 100: 60.0}, "two": {}}, title="?").axes
    assert [list(line.get_ydata()) for line in curves.lines] == [[50.0, 60.0], []]


def test_markdown_columns_line_up() -> None:
    lines = markdown_table(["name", "a number"], [["x", "1.00 ± 0.50"], ["longer", "-"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1] == "| ------ | ----------: |"


def test_report_of_two_runs(finished_place: Path, lgp: Lgp) -> None:
    """A table line for each, named by as much of its path as tells it apart; accuracies are those of paths.json."""
    copy = finished_place / "other" / "run"
    shutil.copytree(finished_place / "run", copy)
    write(finished_place / "results.txt", *map(json.dumps, PUBLISHED))
    has(lgp("report", "run", "run").sentence, "named twice")
    done = lgp("report", "run", "other/run", "--snnet", "results.txt", "--out", "both")
    assert done.status == 0, done
    rows = json.loads((copy / "paths.json").read_text())
    mean = sum(row["top1"] for row in rows) / len(rows)
    lines = [line for line in done.out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["place/run", "other/run", "results"]
    assert f"| {mean:.2f} |" in lines[2] and "70.56" not in lines[2]
    assert (finished_place / "both" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (finished_place / "both" / "compare.md").read_text() in done.out


@pytest.mark.parametrize("missing", ["run", "evaluate", "distil", "file"])
def test_what_is_no_complete_run_is_refused(finished_place: Path, lgp: Lgp, missing: str) -> None:
    """No run; no evaluation; a stage from which it was made is missing; a table that was changed."""
    if missing == "file":
        (finished_place / "run" / "evaluate" / "paths.json").write_text("[]")
    else:
        shutil.rmtree(finished_place / "run" / ("" if missing == "run" else missing))
    has(lgp("report", "run", "--out", "both").sentence, "run")
    assert not (finished_place / "both").exists()


def test_report_of_nothing(place: Path, lgp: Lgp) -> None:
    has(lgp("report").sentence, "lgp report", "run directory")
