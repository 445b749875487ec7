"""The figure of a choice within a budget."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lgp_dist.report.plots import FAINT, INK, STYLE, draw_accuracy, new_panels
from lgp_dist.report.rows import Row, flops_unit

CHOSEN = "#D00000"
"""Colour of the ring around the choice, and of the limits."""


def choice_figure(rows: Sequence[Row], chosen: Row, limits: Mapping[str, float]) -> Figure:
    """Top-1 (percent) of every path against parameters, FLOPs and latency, with the choice and the limits marked.

    rows: with latency_ms. limits: field to its largest value, of the fields that have one.
    """
    divisor, letter = flops_unit(rows)
    panels = {
        "params": (1e6, "Parameters (M)"),
        "flops": (divisor, f"FLOPs ({letter} multiply-adds)"),
        "latency_ms": (1.0, "Latency (ms)"),
    }
    with matplotlib.rc_context(STYLE):
        handles = [
            Line2D(
                [], [], color=CHOSEN, marker="o", ls="", ms=9, mfc="none", mew=1.6, label=f"Chosen: {chosen['key']}"
            ),
            Line2D([], [], color=INK, lw=1.2, alpha=0.75, label="Pareto front"),
            Line2D([], [], color=FAINT, marker="o", ls="", ms=6, mfc="white", mew=1.3, label="Dominated"),
        ]
        handles += [Line2D([], [], color=CHOSEN, ls="--", lw=1.1, label="Limit")] if limits else []
        figure, axes = new_panels(3, 3.6, handles, gap=0.09, sharey=True)
        title = f"The most accurate of {len(rows)} paths within the limits"
        figure.suptitle(title, x=0.066, y=0.97, ha="left", va="top", fontsize=11.5, fontweight="bold", color=INK)
        for panel, (field, (unit, label)) in zip(axes, panels.items(), strict=True):
            draw_accuracy(panel, rows, [], field, unit)
            at = chosen[field] / unit
            panel.plot(at, chosen["top1"], marker="o", ms=13, mfc="none", mec=CHOSEN, mew=1.6, ls="", zorder=7)
            if field in limits:
                panel.axvline(limits[field] / unit, color=CHOSEN, ls="--", lw=1.1, zorder=2)
            panel.set_xlabel(label)
        axes[0].set_ylabel("Top-1 accuracy (%)")
    return figure
