"""The report: Pareto fronts, tables, figures and the HTML page. No torch, no run needed."""

import csv
import itertools
import json
import math
import random
import re
import subprocess
from html.parser import HTMLParser

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lgp_dist.config.flat import STAGES, flatten
from lgp_dist.errors import UserError
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import tiny
from lgp_dist.report.curves import Curves, curves_of
from lgp_dist.report.html import RunReport, render_report
from lgp_dist.report.plots import figure_svg, kind_style, loss_figure, pareto_figure, report_figures, save_figure
from lgp_dist.report.publish import publish
from lgp_dist.report.rows import FIELDS, kind_label, kind_of, kinds, pareto_front
from lgp_dist.report.tables import paths_table, write_paths_csv, write_paths_json
from lgp_dist.run.artifacts import Artifact

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
HOSTILE = "<script>alert('x')</script>&\"$a_b^c$ é"


def make_row(key, low, high, rows, stitch, flops, params, top1):
    names = dict(zip(("low_row", "high_row"), rows, strict=True))
    costs = {"params": params, "params_paper": params - 38_000, "flops": flops}
    return {"key": key, "low": low, "high": high, **names, "stitch": stitch, **costs, "top1": top1, "top5": top1 + 5}


@pytest.fixture
def rows():
    return [
        make_row("r1.0-5", 0, 6, (None, 1), None, 8_850_000_000, 43_200_000, 79.5),
        make_row("r0.0-5", 6, 0, (0, None), None, 640_000_000, 3_050_000, 64.25),
        make_row("r0.0-3+r1.4-5", 4, 2, (0, 1), 3, 3_380_000_000, 17_020_000, 72.0),
        make_row("r0.0-4+r1.4-5", 5, 2, (0, 1), 3, 3_480_000_000, 17_470_000, 71.5),
    ]


@pytest.fixture
def metrics():
    return [
        {"stage": stage, "step": step, "loss": 7 / (1 + step), "cls": 5 / (1 + step), "pred": 2 / (1 + step)}
        | {"lr": 1e-3, "path": ["r0.0-5"], "images_per_s": 900.0, "data_wait_s": 0.01, "step_time_s": 0.5}
        | {"accumulate": 1, "world": 1, "bad_samples": 0, "cache_bytes": 7, "top1/r0.0-5": 10.0}
        for stage in ("distil", "finetune")
        for step in range(0, 60, 2)
    ]


def page(rows, metrics=(), title="A run", **more):
    return render_report(RunReport(title, rows, curves=curves_of(metrics), **more))


class Balance(HTMLParser):
    """Fails where a tag closes what is not open; keeps tags, ids and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes nothing"


@pytest.mark.parametrize("cost", ["flops", "params"])
@pytest.mark.parametrize("seed", range(20))
def test_pareto_front_is_what_brute_force_finds(cost, seed):
    draw = random.Random(seed)
    points = [{"key": str(i), cost: draw.randint(1, 12), "top1": float(draw.randint(1, 12))} for i in range(25)]

    def beats(a, b):
        better = a[cost] < b[cost] or a["top1"] > b["top1"]
        return a[cost] <= b[cost] and a["top1"] >= b["top1"] and better

    expected = {(p[cost], p["top1"]) for p in points if not any(beats(q, p) for q in points)}
    front = pareto_front(points, cost)
    assert [(row[cost], row["top1"]) for row in front] == sorted(expected)
    assert all(any(row is point for point in points) for row in front)


def test_pareto_front_does_not_depend_on_the_order_of_rows():
    points = [{"key": key, "flops": 1, "top1": 50.0} for key in "abc"]
    assert {pareto_front(order)[0]["key"] for order in itertools.permutations(points)} == {"a"}
    assert pareto_front([]) == []


def test_kinds_are_named_from_narrow_to_wide(rows):
    assert [kind_label(kind, kinds(rows)) for kind in kinds(rows)] == ["Narrow row alone", "Stitched", "Wide row alone"]
    three = [(0,), (0, 1), (1,), (1, 2), (2,)]
    assert [kind_label(kind, three) for kind in three[1:4]] == [
        "Stitched, row 0 to 1",
        "Row 1 alone",
        "Stitched, row 1 to 2",
    ]
    assert kind_of(rows[0]) == (1,)


def test_table_is_sorted_aligned_and_marks_the_front(rows):
    lines = paths_table(rows).splitlines()
    assert [line.split()[-8] for line in lines[2:6]] == [
        "r0.0-5",
        "r0.0-3+r1.4-5",
        "r0.0-4+r1.4-5",
        "r1.0-5",
    ]
    assert [line[0] for line in lines[2:6]] == ["*", "*", " ", "*"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[3].split()[2:] == ["4", "2", "3", "17.02", "3.38", "72.00", "77.00"]
    assert "3 of 4 paths" in lines[-1]
    assert paths_table([]) == "no evaluated paths"


def test_table_stays_narrow_and_plain_for_any_key(rows):
    rows += [{**rows[0], "key": "k" * 300}, {**rows[0], "key": "\x1b[31m" + HOSTILE, "flops": 9_999_999_999_999}]
    text = paths_table(rows)
    assert text.isascii() and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_table_of_tiny_paths_keeps_digits(rows):
    tiny = [{**row, "params": row["params"] // 1000, "flops": row["flops"] // 1000} for row in rows]
    assert "FLOPs (M)" in paths_table(tiny) and "0.0432" in paths_table(tiny)


def test_csv_and_json_give_the_rows_back(rows, tmp_path):
    write_paths_json(rows, tmp_path / "new" / "paths.json")
    assert json.loads((tmp_path / "new" / "paths.json").read_text()) == rows
    write_paths_csv([{**row, "note": 'a, "b"\nc'} for row in rows], tmp_path / "paths.csv")
    with (tmp_path / "paths.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        back = list(reader)
    assert reader.fieldnames == [*FIELDS, "note"]
    for row, line in zip(rows, back, strict=True):
        assert line["note"] == 'a, "b"\nc'
        assert {name: line[name] for name in FIELDS} == {
            name: "" if row[name] is None else str(row[name]) for name in FIELDS
        }
    write_paths_json([], tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text()) == []


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(rows, tmp_path, monkeypatch):
    path = tmp_path / "paths.json"
    write_paths_json(rows, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_paths_json(rows[:1], path)
    assert json.loads(path.read_text()) == rows
    assert [each.name for each in tmp_path.iterdir()] == ["paths.json"]


@pytest.mark.slow
def test_figures_are_the_same_bytes_each_time(rows, metrics, tmp_path):
    for name in ("a", "b"):
        save_figure(pareto_figure(rows, title="t"), tmp_path / name / "v1.0")
    for kind in ("svg", "png"):
        assert (tmp_path / f"a/v1.0.{kind}").read_bytes() == (tmp_path / f"b/v1.0.{kind}").read_bytes()
    curves = curves_of(metrics)["distil"]
    figure = loss_figure(curves, "distil", ["cls", "pred"])
    again = loss_figure(curves, "distil", ["cls", "pred"])
    assert figure_svg(figure) == figure_svg(again) == figure_svg(figure)
    assert not re.search(r"\d\d:\d\d:\d\d", figure_svg(figure))


@pytest.mark.parametrize("count", [0, 1])
def test_figures_of_almost_nothing(rows, metrics, count):
    assert "<svg" in figure_svg(pareto_figure(rows[:count], title=HOSTILE))
    assert "<svg" in figure_svg(loss_figure(curves_of(metrics[:count]).get("distil", Curves()), "distil"))
    bad = [{"stage": "s", "step": 0, "loss": float("nan"), "cls": None}]
    assert "<svg" in figure_svg(loss_figure(curves_of(bad)["s"], "s"))


def drawn(figure):
    """What the curves of a figure show, by name."""
    return {line.get_label() for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}


def test_kinds_of_a_two_way_pool_are_told_apart() -> None:
    """Six kinds with as many looks, and a legend that lies inside the figure."""
    space = PathSpace((32, 96), 4, 28, 7, 1, 10, two_way=True)
    rows = [{**space.describe(path), "top1": 80.0 + place, "top5": 99.0} for place, path in enumerate(space.paths)]
    assert len(kinds(rows)) == len({kind_style(kind, kinds(rows)) for kind in kinds(rows)}) == 6
    for system in (rows, rows[:3]):
        figure = pareto_figure(system, title="Two-way")
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0


def test_loss_figures_show_losses_alone(rows, metrics):
    """No learning rate, accuracy, time or count, whatever a count is called."""
    lines = [{**line, "bytes_read": 3, "lr_row1": 0.5, "skipped": 0, "epoch": 0.5} for line in metrics]
    figures = report_figures(rows, curves_of(lines), title="t")
    assert {name: drawn(figure) for name, figure in figures.items() if name.startswith(("loss", "parts"))} == {
        f"{kind}_{stage}": names
        for stage in ("distil", "finetune")
        for kind, names in (("loss", {"loss"}), ("parts", {"cls", "pred"}))
    }


def test_validation_figure_shows_each_path_and_their_mean(rows):
    accuracies = {10: {"r0.0-5": 50.0, "r1.0-5": 70.0}, 20: {"r0.0-5": 60.0, "r1.0-5": 90.0}}
    lines = [
        {"stage": "finetune", "step": step, "loss": 1.0}
        | {f"top1/{key}": top1 for key, top1 in accuracies.get(step, {}).items()}
        for step in range(30)
    ]
    figure = report_figures(rows, curves_of(lines), title="t")["validation_finetune"]
    shown = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()]
    assert shown == [([10, 20], values) for values in ([50.0, 60.0], [70.0, 90.0], [60.0, 75.0])]


@pytest.mark.parametrize(("name", "left", "right"), [("pareto", 0.64, 8.85), ("pareto_params", 3.05, 43.2)])
def test_axes_fit_the_trained_paths(rows, name, left, right):
    """They end close to the cheapest, the most expensive, the least and the most accurate path."""
    panel = report_figures(rows, {}, title="t")[name].axes[0]
    assert 60 < panel.get_ylim()[0] < 64.25 and 79.5 < panel.get_ylim()[1] < 83
    assert left / 1.5 < panel.get_xlim()[0] < left and right < panel.get_xlim()[1] < 1.5 * right


def test_a_resumed_run_shows_each_step_once():
    lines = [{"stage": "s", "step": step, "loss": loss} for step, loss in [(0, 3.0), (1, 2.0), (1, 1.5), (2, 1.0)]]
    curves = curves_of(lines)["s"]
    assert list(curves.steps) == [0, 1, 2] and list(curves.of("loss")) == [3.0, 1.5, 1.0]


def test_lines_without_a_number_leave_a_gap():
    """A column has a value for each step: NaN before its first line, where it is missing, null or not finite."""
    losses = [{}, {"cls": 1.0}, {}, {"cls": None}, {"cls": float("inf")}, {"cls": 2}, {"cls": "x"}]
    lines = [{"stage": "s", "step": step, **loss} for step, loss in enumerate(losses)]
    curves = curves_of(lines)["s"]
    assert [None if math.isnan(value) else value for value in curves.of("cls")] == [None, 1, None, None, None, 2, None]
    assert curves.finite("cls") == [1.0, 2.0] and len(curves.of("none")) == len(lines) and not curves.finite("none")


def test_page_is_well_formed_and_needs_nothing_from_outside(rows, metrics):
    figures = {name: figure_svg(each) for name, each in report_figures(rows, curves_of(metrics), title="A run").items()}
    text = page(
        rows,
        metrics,
        figures=figures,
        before=[{**row, "top1": 1.0} for row in rows],
        config={"seed": 0, "distil.lr": 5e-4, "distil.crop": (0.1, 1.0)},
        environment={"python": "3.11", "gpu": {"name": "none"}},
        artifacts=[
            {"stage": "distil", "id": "d1", "seconds": 4000, "command": "lgp distil", "commit": "abc"}
            | {"created": "1970-01-01T00:00:00Z"}
        ],
        descendant=rows[2],
        export_folder="out",
    )
    seen = Balance(text)
    assert all(address.startswith(("#", "data:")) for address in seen.addresses)
    assert not {"iframe", "object", "embed", "img", "base"} & set(seen.tags)
    assert len(seen.ids) == len(set(seen.ids))
    assert {address[1:] for address in seen.addresses if address[0] == "#"} <= set(seen.ids)
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    parts = (
        "79.50 %",
        "1970-01-01 00:00 UTC",
        "1 h 6 min",
        "local-dir:out",
        "distil.lr",
        "gpu.name",
        "+71.00",
        "chosen",
    )
    for part in parts:
        assert part in text
    assert "+71.00" in text


def test_page_escapes_whatever_it_is_given(rows):
    row = {**rows[2], "key": HOSTILE}
    bad = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    line = {"stage": HOSTILE, "step": 1, "loss": 1.0, HOSTILE: 2.0}
    figures = {n: figure_svg(f) for n, f in report_figures([row], curves_of([line]), title=HOSTILE).items()}
    text = page(
        [row],
        [line],
        HOSTILE,
        figures=figures,
        before=[row],
        config=bad,
        environment=bad,
        artifacts=[dict.fromkeys(("stage", "id", "created", "command", "extra"), HOSTILE) | {"seconds": 1.0}],
        overview={HOSTILE: HOSTILE},
        budget=HOSTILE,
        descendant=row,
        export_folder=HOSTILE,
    )
    assert Balance(text).tags.count("script") == 1
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_page_of_nothing_says_so():
    text = page([])
    Balance(text)
    for sentence in ("No path has been evaluated", "No path has been chosen", "No training", "No stage is complete"):
        assert sentence in text


def published(tmp_path, rows, changes=None, command="lgp run tiny"):
    """The report of a run directory with all its stages, as text."""
    facts = {"ancestry": {"top1": 91.25, "params": 1_349_770}, "descend": rows[2], "export": rows[2]}
    artifacts = []
    for hour, stage in enumerate(STAGES):
        folder = tmp_path / stage
        folder.mkdir()
        record = {"stage": stage, "id": f"{hour}" * 64, "created": f"2026-01-02T0{hour}:05:06Z", "seconds": 60.0}
        record |= {"world": 1 if stage == "ancestry" else 2, "command": command, "commit": "c" * 40}
        artifacts.append(Artifact(folder, record | {"facts": facts.get(stage, {}), "inputs": {}}))
    write_paths_json(rows, tmp_path / "evaluate" / "paths.json")
    (tmp_path / "environment.json").write_text(json.dumps({"command": command, "commit": "c" * 40}))
    publish(tmp_path, "tiny", flatten(tiny()) | (changes or {}), artifacts, "cpu: a processor")
    text = (tmp_path / "report.html").read_text()
    Balance(text)
    return text


def test_report_says_what_the_run_is(rows, tmp_path):
    """Data, seed, ranks, device, duration, date, the ancestry, the choice and its budget; a long command once."""
    command = "lgp run tiny " + " ".join(f"--data.root {'x' * 90}/{index}" for index in range(5))
    changes = {"seed": 17, "data.root": "shards/mine", "budget.max_params": 2.5e6, "budget.max_flops": 3e9}
    text = published(tmp_path, rows, changes, command)
    terms = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert terms["Data set"].startswith("shards/mine: ") and terms["Seed"] == "17"
    assert (terms["Ranks"], terms["Device"]) == ("1, 2", "cpu: a processor")
    assert (terms["Duration"], terms["Finished"]) == ("7 min 0 s for 7 stages", "2026-01-02 06:05 UTC")
    assert (terms["Path"], terms["Budget"]) == (
        rows[2]["key"],
        "max_params 2.50 M, max_flops 3.00 G",
    )
    assert "91.25 %" in text and "1.35 M parameters" in text
    (shown,) = [found for found in re.findall(r"<pre class=wrap>(.*?)</pre>", text, re.DOTALL) if "lgp run" in found]
    said = subprocess.run(
        ["bash", "-c", f'lgp() {{ echo "$@"; }}; {shown}'], capture_output=True, text=True, check=True
    )
    assert f"lgp {said.stdout}" == f"{command}\n" and text.count("lgp run tiny") == 1


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"budget.max_latency_ms": 8.0, "budget.max_params": 0}, "max_latency_ms 8"),
        ({"budget.max_params": 0}, "none: the most accurate path"),
        ({"export.path": "r1.0-5"}, "none: export.path names the path"),
    ],
)
def test_report_says_why_a_path_was_chosen(rows, tmp_path, changes, budget):
    assert f"<dd>{budget}</dd>" in published(tmp_path, rows, changes)
