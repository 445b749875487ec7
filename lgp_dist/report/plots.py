"""Figures of a run: accuracy against cost, and training curves. Same input, same bytes."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lgp_dist.files import write_atomic
from lgp_dist.report.curves import Curves
from lgp_dist.report.rows import Kind, Row, flops_unit, kind_label, kind_of, kinds, pareto_front

INK, FAINT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
SINGLE_STYLES = (("#0072B2", "s"), ("#009E73", "D"), ("#56B4E9", "^"))
"""Colour and marker of the narrowest row alone, of the widest, of those between (Okabe and Ito's palette)."""
STITCH_STYLES = (("#D55E00", "o"), ("#CC79A7", "v"), ("#E69F00", "P"))
"""Colour and marker of stitched paths, one for each pair of rows."""
LINE_STYLES = tuple(
    (colour, dash) for dash in ("-", "--", ":") for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
)
"""Colour and dash of the named parts of a loss."""
NOT_LOSSES = frozenset(
    {
        "step",
        "epoch",
        "samples",
        "rank",
        "world",
        "seed",
        "loss",
        "grad_norm",
        "loss_scale",
        "skipped",
        "time",
        "seconds",
    }
)
"""Fields of a metrics line that are no part of the loss; so are names that end in _s, _ms, _gb or start with lr."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
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
MAX_POINTS = 1200
"""Points drawn for one curve; longer runs are thinned so that an SVG stays small."""


def pareto_figure(rows: Sequence[Row], *, title: str, before: Sequence[Row] | None = None) -> Figure:
    """Top-1 (percent) of every path against its FLOPs (left) and its parameters (right), with both Pareto fronts.

    before: the same paths before fine-tuning, drawn faint in the left panel and joined to what they became. The
    right panel then has an accuracy axis of its own, so that a deep fall before fine-tuning does not flatten it.
    """
    with matplotlib.rc_context(STYLE):
        handles = _pareto_legend(kinds(rows), bool(before))
        figure, (left, right) = new_panels(2, 4.0, handles, gap=0.12 if before else 0.07, sharey=not before)
        figure.suptitle(title, x=0.066, y=0.97, ha="left", va="top", fontsize=11.5, fontweight="bold", color=INK)
        divisor, letter = flops_unit(rows)
        draw_accuracy(left, rows, before or [], "flops", divisor)
        draw_accuracy(right, rows, [], "params", 1e6)
        left.set_xlabel(f"FLOPs ({letter} multiply-adds)")
        right.set_xlabel("Parameters (M)")
        left.set_ylabel("Top-1 accuracy (%)")
    return figure


def loss_figure(curves: Curves, stage: str) -> Figure:
    """Training curves of one stage: the loss, and its named parts, against the optimiser step.

    Thin lines are the values as logged, thick ones their moving average. A value that is not finite leaves a gap.
    """
    parts = _part_names(curves)
    with matplotlib.rc_context(STYLE):
        handles = [
            Line2D([], [], color=colour, ls=dash, lw=1.7, label=name)
            for name, (colour, dash) in zip(parts, LINE_STYLES, strict=False)
        ]
        figure, axes = new_panels(2 if parts else 1, 3.3, handles, gap=0.12)
        _curve(axes[0], curves, "loss", INK, "-")
        axes[0].set_title(f"{stage}: loss")
        if parts:
            axes[1].set_title(f"{stage}: parts of the loss")
        for handle in handles:
            _curve(axes[1], curves, handle.get_label(), handle.get_color(), handle.get_linestyle())
        for panel in axes:
            _finish_curves(panel, curves)
    return figure


def report_figures(
    rows: Sequence[Row], curves: Mapping[str, Curves], *, title: str, before: Sequence[Row] | None = None
) -> dict[str, Figure]:
    """All figures that a report shows, by the name under which the HTML report looks for them.

    "pareto" where there are rows, and "loss_STAGE" for each stage of `curves`.
    """
    figures = {"pareto": pareto_figure(rows, title=title, before=before)} if rows else {}
    for stage, logged in curves.items():
        figures[f"loss_{stage}"] = loss_figure(logged, stage)
    return figures


def figure_svg(figure: Figure) -> str:
    """A figure as SVG text, without date or creator: the same figure gives the same bytes."""
    return _render(figure, "svg").decode()


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Writes STEM.png (150 dots per inch) and STEM.svg, each whole or not at all, and returns both paths.

    Raises UserError where they cannot be written.
    """
    stem = Path(stem)
    written = (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg"))
    for path in written:
        write_atomic(path, _render(figure, path.suffix[1:]))
    return written


def new_panels(
    count: int, height: float, handles: Sequence[Line2D], *, gap: float, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side and one legend below them.

    height: inches without the legend, which adds its own. gap: between panels, as a share of their width.
    """
    lines = math.ceil(len(handles) / 6)
    legend = 0.12 + 0.24 * lines if lines else 0.0
    figure = Figure(figsize=(10.2, height + legend))
    axes = list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
    top, bottom = 0.42 / (height + legend), (0.52 + legend) / (height + legend)
    figure.subplots_adjust(left=0.066, right=0.985, top=1 - top, bottom=bottom, wspace=gap)
    if handles:
        columns = math.ceil(len(handles) / lines)
        figure.legend(handles=handles, loc="lower center", ncols=columns, handletextpad=0.5, columnspacing=1.8)
    return figure, axes


def _render(figure: Figure, kind: str) -> bytes:
    """A figure as bytes of "png" or "svg"."""
    empty = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None, "Format": None, "Type": None}}
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=150, metadata=empty[kind])
    return buffer.getvalue()


def kind_style(kind: Kind, all_kinds: Sequence[Kind]) -> tuple[str, str]:
    """Colour and marker of a kind of path, the same in every figure of a pool."""
    if len(kind) == 2:
        pairs = [each for each in all_kinds if len(each) == 2]
        return STITCH_STYLES[pairs.index(kind) % len(STITCH_STYLES)]
    visited = sorted({index for each in all_kinds for index in each})
    if kind[0] == visited[0]:
        return SINGLE_STYLES[0]
    return SINGLE_STYLES[1 if kind[0] == visited[-1] else 2]


def draw_accuracy(panel: Axes, rows: Sequence[Row], before: Sequence[Row], cost: str, divisor: float) -> None:
    """Draws one panel: faint points before, points after, the Pareto front and the labels at its ends."""
    all_kinds = kinds(rows)
    after = {row["key"]: row for row in rows}
    for row in before:
        if row["key"] not in after:
            continue
        colour, marker = kind_style(kind_of(row), all_kinds)
        x = row[cost] / divisor
        panel.plot([x, x], [row["top1"], after[row["key"]]["top1"]], color=colour, alpha=0.18, lw=0.9, zorder=1)
        panel.plot(x, row["top1"], marker=marker, ms=4.2, color=colour, mec="none", alpha=0.35, ls="", zorder=2)
    front = pareto_front(rows, cost)
    panel.plot(
        [row[cost] / divisor for row in front], [row["top1"] for row in front], color=INK, lw=1.2, alpha=0.75, zorder=3
    )
    for row in rows:
        colour, marker = kind_style(kind_of(row), all_kinds)
        best = any(row is each for each in front)
        panel.plot(
            row[cost] / divisor,
            row["top1"],
            marker=marker,
            ms=7 if len(kind_of(row)) == 1 else 6.2,
            mfc=colour if best else "white",
            mec="white" if best else colour,
            mew=0.7 if best else 1.3,
            ls="",
            zorder=5 if best else 4,
        )
    if rows:
        cost_axis(panel, [row[cost] / divisor for row in rows])
        _label_ends(panel, front, cost, divisor)
        _pad_accuracy(panel, [row["top1"] for row in (*rows, *before)])


def cost_axis(panel: Axes, costs: Sequence[float]) -> None:
    """Limits and ticks for a cost: logarithmic where the dearest path costs more than 6 times the cheapest."""
    low, high = min(costs), max(costs)
    if low > 0 and high / low > 6:
        margin = (high / low) ** 0.075
        panel.set_xscale("log")
        panel.set_xlim(low / margin, high * margin)
        _plain_log_ticks(panel.xaxis)
    else:
        margin = 0.075 * (high - low) or 0.1 * high or 1.0
        panel.set_xlim(max(0.0, low - margin), high + margin)


def _plain_log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10 ..., written as plain numbers."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _pad_accuracy(panel: Axes, values: Sequence[float]) -> None:
    """Limits in percent that leave room for the labels at both ends of the front."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    panel.set_ylim(max(low - 0.12 * span, -0.03 * high), high + 0.13 * span)
    panel.yaxis.set_major_locator(MaxNLocator(7))


def _label_ends(panel: Axes, front: Sequence[Row], cost: str, divisor: float) -> None:
    """Writes key and top-1 at the cheapest and at the most accurate path of the front."""
    ends = [(front[-1], (0, 9), "right", "bottom")]
    if len(front) > 1:
        ends.append((front[0], (8, -5), "left", "top"))
    for row, offset, across, along in ends:
        key = row["key"] if len(row["key"]) <= 28 else f"{row['key'][:27]}…"
        panel.annotate(
            f"{key}   {row['top1']:.1f} %",
            (row[cost] / divisor, row["top1"]),
            xytext=offset,
            textcoords="offset points",
            ha=across,
            va=along,
            fontsize=8,
            color=INK,
            zorder=6,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
        )


def _pareto_legend(all_kinds: Sequence[Kind], before: bool) -> list[Line2D]:
    """Legend entries: each kind of path, the front, what a hollow marker means, and the state before."""
    handles = []
    for kind in all_kinds:
        colour, marker = kind_style(kind, all_kinds)
        handles.append(
            Line2D([], [], color=colour, marker=marker, ls="", ms=6.5, mec="none", label=kind_label(kind, all_kinds))
        )
    handles.append(Line2D([], [], color=INK, lw=1.2, alpha=0.75, label="Pareto front"))
    handles.append(Line2D([], [], color=FAINT, marker="o", ls="", ms=6, mfc="white", mew=1.3, label="Dominated"))
    if before:
        label = "Before fine-tuning"
        handles.append(Line2D([], [], color=FAINT, marker="o", ls="", ms=4.2, mec="none", alpha=0.45, label=label))
    return handles


def _part_names(curves: Curves) -> list[str]:
    """Names of the logged parts of the loss, in the order in which they first appear."""
    return [
        name
        for name in curves.columns
        if name not in NOT_LOSSES and not name.startswith("lr") and not name.endswith(("_s", "_ms", "_gb"))
    ]


def _smooth(values: Sequence[float], half: int) -> list[float]:
    """Centred moving average over up to `half` neighbours on each side; skips NaN.

    Centred also at the start, where fewer values serve, so that a steep fall is neither delayed nor lifted.
    """
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (0.0 if math.isnan(value) else value))
        counts.append(counts[-1] + (not math.isnan(value)))
    result = []
    for i in range(len(values)):
        reach = min(half, i)
        low, high = i - reach, min(i + reach + 1, len(values))
        count = counts[high] - counts[low]
        result.append((sums[high] - sums[low]) / count if count else math.nan)
    return result


def _curve(panel: Axes, curves: Curves, name: str, colour: str, dash: str) -> None:
    """Draws one quantity: as logged (thin) and averaged over a 30th of the run (thick)."""
    values, steps = curves.of(name), curves.steps
    smooth = _smooth(values, len(values) // 60)
    stride = max(1, math.ceil(len(steps) / MAX_POINTS))
    picked = sorted({*range(0, len(steps), stride), *([len(steps) - 1] if steps else [])})
    panel.plot([steps[i] for i in picked], [values[i] for i in picked], color=colour, lw=0.6, alpha=0.28)
    marker = "o" if len(picked) == 1 else None
    panel.plot(
        [steps[i] for i in picked],
        [smooth[i] for i in picked],
        color=colour,
        ls=dash,
        lw=1.7,
        marker=marker,
        label=name,
    )


def _finish_curves(panel: Axes, curves: Curves) -> None:
    """Axis labels and a scale that fits: logarithmic where positive averages span more than a factor of 20."""
    panel.set_xlabel("Optimiser step")
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
