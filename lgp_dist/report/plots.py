"""Figures of a run: accuracy against cost, and training curves. Same input, same bytes."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lgp_dist.files import write_atomic
from lgp_dist.report.curves import Curves
from lgp_dist.report.rows import Kind, flops_unit, kind_label, kind_of, kinds, pareto_front
from lgp_dist.run.path_rows import ModelRow, PathRow, number_of

INK, FAINT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
SINGLE_STYLES = (("#0072B2", "s"), ("#009E73", "D"), ("#56B4E9", "^"))
"""Colour and marker of the narrowest row alone, the widest, and those between (palette of Okabe and Ito)."""
STITCH_STYLES = (("#D55E00", "o"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#000000", "X"))
"""Colour and marker of stitched paths, one for each kind: a two-way pool has four."""
LINE_STYLES = tuple(
    (colour, dash) for dash in ("-", "--", ":") for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
)
"""Colour and dash of the parts of a loss."""
NOT_LOSSES = re.compile("epoch|loss|grad_norm|loss_scale|time|seconds|lr.*|top1/.*|.*_(s|ms|gb)")
"""Names of numbers in metrics that are neither counts nor parts of the loss."""
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "lgp_dist",
}
PANEL = 5.0
"""Inches: the width of a figure of one panel, whose text is legible on a phone."""
MAX_POINTS = 1200
"""Points drawn of one curve; longer runs are thinned to keep an SVG small."""
FRONT = Line2D([], [], color=INK, lw=1.2, alpha=0.75, label="Pareto front")
DOMINATED = Line2D([], [], color=FAINT, marker="o", ls="", ms=6, mfc="white", mew=1.3, label="Dominated")


def pareto_figure(rows: Sequence[PathRow], *, title: str, cost: str = "flops") -> Figure:
    """Top-1 (percent) of every path against a cost, a field, with the Pareto front. The axes fit the paths."""
    with matplotlib.rc_context(STYLE):
        handles = [
            Line2D([], [], color=colour, marker=marker, ls="", ms=6.5, mec="none", label=kind_label(kind, kinds(rows)))
            for kind in kinds(rows)
            for colour, marker in [kind_style(kind, kinds(rows))]
        ]
        figure, (panel,) = new_panels(title, 1, 4.0, [*handles, FRONT, DOMINATED], width=PANEL)
        draw_accuracy(panel, rows, cost)
        panel.set_ylabel("Top-1 accuracy (%)")
    return figure


def loss_figure(curves: Curves, title: str, names: Sequence[str] = ("loss",)) -> Figure:
    """Losses of one stage against the optimizer step, by the names of their columns.

    Thin lines are the values as logged, thick ones their moving average. A value that is not finite leaves a gap.
    """
    with matplotlib.rc_context(STYLE):
        looks = [(INK, "-")] if len(names) == 1 else LINE_STYLES
        styles = [
            Line2D([], [], color=colour, ls=dash, lw=1.7, label=name)
            for name, (colour, dash) in zip(names, looks, strict=False)
        ]
        figure, (panel,) = new_panels(title, 1, 3.3, styles if len(names) > 1 else [], width=PANEL)
        for style in styles:
            _curve(panel, curves, str(style.get_label()), style)
        _finish_curves(panel, curves)
    return figure


def validation_figure(curves: Curves, title: str) -> Figure:
    """Top-1 (percent) of each path while it was trained (thin), and their mean, against the optimizer step."""
    values = np.array([curves.of(name) for name in measured_names(curves)])
    measured = ~np.isnan(values).all(axis=0)  # most steps have no measurement
    steps, values = np.array(curves.steps)[measured], values[:, measured]
    with matplotlib.rc_context(STYLE):
        look = {"marker": "o", "ms": 3}
        handles = [Line2D([], [], color=SINGLE_STYLES[0][0], label="A path", alpha=0.4, lw=0.8, **look)]
        handles.append(Line2D([], [], color=INK, label=f"Mean of {len(values)} paths", lw=1.7, **look))
        figure, (panel,) = new_panels(title, 1, 3.3, handles, width=PANEL)
        for column in values:
            panel.plot(steps, column, color=SINGLE_STYLES[0][0], lw=0.8, alpha=0.4, **look)
        panel.plot(steps, np.nanmean(values, axis=0), color=INK, lw=1.7, **look)
        panel.set_xlabel("Optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        panel.set_ylabel("Top-1 accuracy (%)")
    return figure


def report_figures(rows: Sequence[PathRow], curves: Mapping[str, Curves], *, title: str) -> dict[str, Figure]:
    """The figures of a report by name: "pareto" (against FLOPs) and "pareto_params" if there are rows; of each stage
    "loss_STAGE" and, if logged, "parts_STAGE" and "validation_STAGE"."""
    names = {"pareto": "flops", "pareto_params": "params"} if rows else {}
    figures = {name: pareto_figure(rows, title=title, cost=cost) for name, cost in names.items()}
    for stage, logged in curves.items():
        figures[f"loss_{stage}"] = loss_figure(logged, f"{stage}: loss")
        if parts := part_names(logged):
            figures[f"parts_{stage}"] = loss_figure(logged, f"{stage}: parts of the loss", parts)
        if measured_names(logged):
            figures[f"validation_{stage}"] = validation_figure(logged, f"{stage}: accuracy on validation images")
    return figures


def figure_svg(figure: Figure) -> str:
    """A figure as SVG text without date or creator: the same figure gives the same bytes."""
    return _render(figure, "svg").decode()


def save_figure(figure: Figure, stem: Path) -> None:
    """Writes STEM.png (150 dots per inch) and STEM.svg, each whole or not at all; UserError if that fails."""
    for kind in ("png", "svg"):
        write_atomic(stem.with_name(f"{stem.name}.{kind}"), _render(figure, kind))


def _render(figure: Figure, kind: str) -> bytes:
    empty = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None, "Format": None, "Type": None}}
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=150, metadata=empty[kind])
    return buffer.getvalue()


def new_panels(
    title: str,
    count: int,
    height: float,
    handles: Sequence[Line2D],
    *,
    gap: float = 0.0,
    sharey: bool = False,
    width: float = 10.2,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels next to each other, a title above and one legend below.

    height: inches without the legend. gap: between panels, as a share of their width. width: inches.
    """
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    column = max(1.65, 0.52 + 0.057 * longest)  # inches: handle, gaps and text
    lines = math.ceil(len(handles) / max(1, int(width / column)))
    legend = 0.12 + 0.24 * lines if lines else 0.0
    figure = Figure(figsize=(width, height + legend))
    axes = list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
    top, bottom = 0.42 / (height + legend), (0.52 + legend) / (height + legend)
    left = 0.67 / width
    figure.subplots_adjust(left=left, right=1 - 0.15 / width, top=1 - top, bottom=bottom, wspace=gap)
    figure.suptitle(title, x=left, y=0.97, ha="left", va="top", color=INK)
    if handles:
        columns = math.ceil(len(handles) / lines)
        figure.legend(handles=handles, loc="lower center", ncols=columns, handletextpad=0.5, columnspacing=1.8)
    return figure, axes


def kind_style(kind: Kind, all_kinds: Sequence[Kind]) -> tuple[str, str]:
    """Colour and marker of a kind of path, the same in every figure of a pool."""
    if len(kind) > 1:
        pairs = [each for each in all_kinds if len(each) > 1]
        return STITCH_STYLES[pairs.index(kind) % len(STITCH_STYLES)]
    visited = sorted({index for each in all_kinds for index in each})
    if kind[0] == visited[0]:
        return SINGLE_STYLES[0]
    return SINGLE_STYLES[1 if kind[0] == visited[-1] else 2]


def cost_axis(panel: Axes, rows: Sequence[ModelRow], cost: str) -> float:
    """Label, limits and ticks of an axis with a cost of models; the unit that its values are divided by."""
    divisor, letter = flops_unit(rows)
    unit, label = {
        "flops": (divisor, f"FLOPs ({letter} multiply-adds)"),
        "params": (1e6, "Parameters (M)"),
        "latency_ms": (1.0, "Latency (ms)"),
    }[cost]
    panel.set_xlabel(label)
    if rows:
        fit_costs(panel, [number_of(row, cost) / unit for row in rows])
    return unit


def fit_costs(panel: Axes, costs: Sequence[float]) -> None:
    """Limits and ticks for costs: logarithmic if the largest is more than 6 times the smallest."""
    low, high = min(costs), max(costs)
    if low > 0 and high / low > 6:
        margin = (high / low) ** 0.075
        panel.set_xscale("log")
        panel.set_xlim(low / margin, high * margin)
        _plain_log_ticks(panel.xaxis)
    else:
        margin = 0.075 * (high - low) or 0.1 * high or 1.0
        panel.set_xlim(max(0.0, low - margin), high + margin)


def draw_accuracy(panel: Axes, rows: Sequence[PathRow], cost: str) -> float:
    """Draws paths, their Pareto front and the labels of its ends; returns the unit of the costs."""
    all_kinds, unit, front = kinds(rows), cost_axis(panel, rows, cost), pareto_front(rows, cost)
    x_front = [number_of(row, cost) / unit for row in front]
    panel.plot(x_front, [row["top1"] for row in front], color=INK, lw=1.2, alpha=0.75, zorder=3)
    for row in rows:
        colour, marker = kind_style(kind_of(row), all_kinds)
        on_front = any(row is each for each in front)
        look = {"mfc": colour, "mec": "white", "mew": 0.7} if on_front else {"mfc": "white", "mec": colour, "mew": 1.3}
        size, layer = 7 if row["stitch"] is None else 6.2, 5 if on_front else 4
        panel.plot(number_of(row, cost) / unit, row["top1"], marker=marker, ms=size, ls="", zorder=layer, **look)
    if rows:
        _label_ends(panel, front, x_front)
        top1 = [row["top1"] for row in rows]
        span = (max(top1) - min(top1)) or 1.0  # room for the labels below and above
        panel.set_ylim(max(min(top1) - 0.12 * span, -0.03 * max(top1)), max(top1) + 0.13 * span)
        panel.yaxis.set_major_locator(MaxNLocator(7))
    return unit


def _label_ends(panel: Axes, front: Sequence[PathRow], costs: Sequence[float]) -> None:
    """Writes key and top-1 at the most accurate and at the cheapest path of the front."""
    places = ((-1, (0, 9), "right", "bottom"), (0, (8, -5), "left", "top"))
    for end, offset, across, along in places[: len(front)]:
        key = front[end]["key"]
        panel.annotate(
            f"{key if len(key) <= 28 else f'{key[:27]}…'}   {front[end]['top1']:.1f} %",
            (costs[end], front[end]["top1"]),
            xytext=offset,
            textcoords="offset points",
            ha=across,
            va=along,
            fontsize=8,
            color=INK,
            zorder=6,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
        )


def _plain_log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10 ..., written as plain numbers."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def part_names(curves: Curves) -> list[str]:
    """Names of the logged parts of the loss, in the order of their first lines."""
    return [name for name in curves.columns if name not in curves.counts and not NOT_LOSSES.fullmatch(name)]


def measured_names(curves: Curves) -> list[str]:
    """Names of the accuracies of paths that were measured while training."""
    return [name for name in curves.columns if name.startswith("top1/") and curves.finite(name)]


def _smooth(values: Iterable[float], half: int) -> np.ndarray:
    """Moving average over up to `half` neighbours on each side, without NaN.

    It stays centred at the start, with fewer neighbours, so a steep fall is neither delayed nor lifted.
    """
    logged = np.array(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.nan_to_num(logged), ~np.isnan(logged)))
    place = np.arange(len(logged))
    reach = np.minimum(half, place)
    low, high = place - reach, np.minimum(place + reach + 1, len(logged))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _curve(panel: Axes, curves: Curves, name: str, style: Line2D) -> None:
    """Draws one quantity: as logged (thin), and averaged over a 30th of the run (thick, in this style)."""
    steps, values = np.array(curves.steps), np.array(curves.of(name))
    count = len(steps)
    smooth = _smooth(values, count // 60)
    picked = sorted({*range(0, count, max(1, math.ceil(count / MAX_POINTS))), *range(max(0, count - 1), count)})
    look = {"color": style.get_color(), "ls": style.get_linestyle(), "lw": style.get_linewidth()}
    panel.plot(steps[picked], values[picked], color=look["color"], lw=0.6, alpha=0.28)
    panel.plot(steps[picked], smooth[picked], marker="o" if count == 1 else None, label=name, **look)


def _finish_curves(panel: Axes, curves: Curves) -> None:
    """Labels and a scale that fits: logarithmic if positive averages span more than a factor of 20."""
    panel.set_xlabel("Optimizer step")
    panel.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    drawn = [y for curve in panel.get_lines()[1::2] for y in curve.get_ydata() if not math.isnan(y)]
    if not drawn:
        panel.text(0.5, 0.5, "nothing logged", transform=panel.transAxes, ha="center", color=FAINT)
        return
    first, last = curves.steps[0], curves.steps[-1]
    panel.set_xlim(first, last + (first == last))
    if min(drawn) > 0 and max(drawn) / min(drawn) > 20:
        panel.set_yscale("log")
        _plain_log_ticks(panel.yaxis)
