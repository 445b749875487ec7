"""The figure of `lgp descend --plot`: the chosen path among all, and the limits."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lgp_dist.report.plots import DOMINATED, FRONT, STYLE, draw_accuracy, new_panels
from lgp_dist.run.path_rows import PathRow, number_of

CHOSEN = "#D00000"
"""Colour of the ring around the choice, and of the limits."""


def choice_figure(rows: Sequence[PathRow], chosen: PathRow, limits: Mapping[str, float]) -> Figure:
    """Top-1 (percent) of every path against parameters, FLOPs and latency, with the choice and the limits marked.

    rows: with latency_ms. limits: of fields.
    """
    ring = {"color": CHOSEN, "marker": "o", "ls": "", "mfc": "none", "mew": 1.6}
    with matplotlib.rc_context(STYLE):
        handles = [Line2D([], [], ms=9, label=f"Chosen: {chosen['key']}", **ring), FRONT, DOMINATED]
        handles += [Line2D([], [], color=CHOSEN, ls="--", lw=1.1, label="Limit")] if limits else []
        title = f"The most accurate of {len(rows)} paths within the limits"
        figure, axes = new_panels(title, 3, 3.6, handles, gap=0.09, sharey=True)
        for panel, field in zip(axes, ("params", "flops", "latency_ms"), strict=True):
            unit = draw_accuracy(panel, rows, field)
            panel.plot(number_of(chosen, field) / unit, chosen["top1"], ms=13, zorder=7, **ring)
            if field in limits:
                panel.axvline(limits[field] / unit, color=CHOSEN, ls="--", lw=1.1, zorder=2)
        axes[0].set_ylabel("Top-1 accuracy (%)")
    return figure
