"""The report of a run as one HTML file that needs nothing else: no network and no folder beside it."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from lgp_dist.report.curves import Curves
from lgp_dist.report.draw_table import draws_section
from lgp_dist.report.page import CSS, SCRIPT
from lgp_dist.report.rows import Row, amount, decimals, flops_unit, kind_label, kind_of, kinds, pareto_front

DESCENDANT_FIELDS = {
    "key": "Path",
    "params": "Parameters",
    "flops": "Multiply-adds",
    "top1": "Top-1 (%)",
    "top5": "Top-5 (%)",
    "budget": "Budget",
    "file": "File",
}
"""The descendant's known fields in words."""


def render_report(
    *,
    title: str,
    rows: Sequence[Row],
    curves: Mapping[str, Curves],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    artifacts: Sequence[Mapping[str, Any]],
    descendant: Mapping[str, Any] | None,
    figures: Mapping[str, str],
    before: Sequence[Row] | None = None,
    ledger: Mapping[str, Any] | None = None,
) -> str:
    """The whole report as HTML text. All data is escaped; the figures are trusted to be ours.

    rows, before: evaluated paths after and before fine-tuning. curves: of each stage. config: flat, with
    dotted keys. artifacts: what each stage left, with stage, id, created (text or seconds since 1970), seconds,
    command and whatever else. descendant: the chosen path, with key and any of params, flops, top1, top5, budget,
    file and load (code to load it, shown as it is). figures: SVG text by the names of `plots.report_figures`. ledger:
    as `ledger.build_ledger` makes it.
    Whatever is missing or empty leaves its section out or says so.
    """
    sections = [
        ("headline", "Headline", _headline(rows, before or [])),
        ("pareto", "Accuracy against cost", _figure(figures, "pareto")),
        ("paths", "All paths", _paths(rows, before or [], descendant)),
        ("descendant", "Descendant", _descendant(descendant)),
        ("training", "Training", _training(curves, figures)),
        ("draws", "Draws of each path", draws_section(ledger)),
        ("provenance", "Provenance", _provenance(artifacts)),
        ("environment", "Environment", _pairs(environment)),
        ("config", "Configuration", _config(config)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in shown)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>"
        f"<h1>{escape(title)}</h1><nav>{links}</nav>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _headline(rows: Sequence[Row], before: Sequence[Row]) -> str:
    """Cards: best path, smallest path, how many paths, what fine-tuning changed."""
    if not rows:
        return '<p class="soft">No path has been evaluated yet.</p>'
    best = max(rows, key=lambda row: (row["top1"], -row["flops"]))
    smallest = min(rows, key=lambda row: (row["params"], -row["top1"]))
    front = pareto_front(rows)
    stitched = sum(len(kind_of(row)) == 2 for row in rows)
    notes = {
        row["key"]: f"<code>{escape(row['key'])}</code><br>{amount(row['params'])} parameters<br>"
        f"{amount(row['flops'])} multiply-adds"
        for row in (best, smallest)
    }
    cards = [
        ("Best path, top-1", f"{best['top1']:.2f} %", notes[best["key"]]),
        ("Smallest path, top-1", f"{smallest['top1']:.2f} %", notes[smallest["key"]]),
        ("Paths evaluated", str(len(rows)), f"{stitched} stitched, {len(rows) - stitched} of one row alone"),
        ("On the Pareto front", str(len(front)), "no other path is as accurate for fewer FLOPs"),
    ]
    change = _changes(rows, before)
    if change:
        mean = sum(change.values()) / len(change)
        worse = sum(value < 0 for value in change.values())
        cards.append(
            ("Fine-tuning, top-1", f"{mean:+.2f}", f"points, mean of {len(change)} paths; {worse} of them got worse")
        )
    return '<div class="cards">{}</div>'.format(
        "".join(
            f'<div class="card"><span class="label">{label}</span><b>{value}</b><span class="note">{note}</span></div>'
            for label, value, note in cards
        )
    )


def _changes(rows: Sequence[Row], before: Sequence[Row]) -> dict[str, float]:
    """Points of top-1 that each path gained, by key, for paths known in both states."""
    old = {row["key"]: row["top1"] for row in before}
    return {row["key"]: row["top1"] - old[row["key"]] for row in rows if row["key"] in old}


def _paths(rows: Sequence[Row], before: Sequence[Row], descendant: Mapping[str, Any] | None) -> str:
    """The table of all paths, cheapest first, Pareto rows tinted."""
    if not rows:
        return ""
    divisor, letter = flops_unit(rows)
    all_kinds, change = kinds(rows), _changes(rows, before)
    front = {row["key"] for row in pareto_front(rows)}
    params = decimals([row["params"] / 1e6 for row in rows])
    flops = decimals([row["flops"] / divisor for row in rows])
    heads = [
        "Params (M)",
        "Paper (M)",
        f"FLOPs ({letter})",
        "Top-1 (%)",
        "Top-5 (%)",
        *(["Change"] * bool(change)),
    ]
    lines = []
    for row in sorted(rows, key=lambda row: (row["flops"], -row["top1"], row["key"])):
        on_front, chosen = row["key"] in front, bool(descendant) and row["key"] == descendant.get("key")
        top1 = f"{row['top1']:.2f}"
        cells = [
            _cell(int(not on_front), "★" if on_front else "", ""),
            _cell(
                row["key"],
                f"<code>{escape(row['key'])}</code>" + (' <span class="badge">chosen</span>' if chosen else ""),
                "",
            ),
            _cell(f"{row['low']:04}{row['high']:04}", _strip(row), ""),
            _cell(kind_label(kind_of(row), all_kinds), kind_label(kind_of(row), all_kinds), ""),
            _cell(-1 if row["stitch"] is None else row["stitch"], "–" if row["stitch"] is None else str(row["stitch"])),
            _cell(row["params"], f"{row['params'] / 1e6:.{params}f}"),
            _cell(row["params_paper"], f"{row['params_paper'] / 1e6:.{params}f}"),
            _cell(row["flops"], f"{row['flops'] / divisor:.{flops}f}"),
            _cell(row["top1"], f"<strong>{top1}</strong>" if on_front else top1),
            _cell(row["top5"], f"{row['top5']:.2f}"),
        ]
        if change:
            cells.append(_change_cell(change.get(row["key"])))
        marks = " ".join(["front"] * on_front + ["chosen"] * chosen)
        lines.append(f'<tr class="{marks}">{"".join(cells)}</tr>')
    head = '<th><span title="on the Pareto front">★</span></th><th>Path</th><th>Blocks</th><th>Kind</th>'
    head += "".join(f'<th class="n">{text}</th>' for text in ["Stitch", *heads])
    return (
        '<p class="soft">★ and tint: on the Pareto front of top-1 against FLOPs. FLOPs are multiply-adds. '
        "Paper: parameters as the published tables count them, without class and position embedding on stitched paths. "
        "Click a heading to sort.</p>"
        f'<div class="panel"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}'
        "</tbody></table></div>"
    )


def _cell(value: Any, content: str, css: str = "n") -> str:
    """A table cell that sorts by `value`; `content` is HTML."""
    return f'<td class="{css}" data-v="{escape(str(value))}">{content}</td>'


def _change_cell(points: float | None) -> str:
    """How far fine-tuning moved a path, in points of top-1."""
    if points is None:
        return _cell("", "–")
    return _cell(points, f'<span class="{"down" if points < 0 else "up"}">{points:+.2f}</span>')


def _strip(row: Row) -> str:
    """A path as a row of small blocks, one colour for each of the pool's rows."""
    parts = [f'<i class="r{int(index) % 4}"></i>' * blocks for index, blocks in _segments(row)]
    return f'<span class="strip" aria-hidden="true">{"<i class=s></i>".join(parts)}</span>'


def _segments(row: Row) -> list[tuple[int, int]]:
    """(row of the pool, blocks) for each part of a path."""
    parts = [(row["low_row"], row["low"]), (row["high_row"], row["high"])]
    return [(index, blocks) for index, blocks in parts if index is not None and blocks]


def _descendant(descendant: Mapping[str, Any] | None) -> str:
    """What was chosen, its numbers, and how to load it."""
    if not descendant:
        return '<p class="soft">No descendant has been chosen yet.</p>'
    items = []
    for name, value in descendant.items():
        if name == "load" or value is None:
            continue
        label, text = DESCENDANT_FIELDS.get(name, str(name)), _text(value)
        if isinstance(value, int | float) and name in ("params", "params_paper", "flops"):
            text = amount(value)
        elif isinstance(value, float):
            text = f"{value:.2f}"
        items.append(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>")
    load = descendant.get("load")
    file = str(descendant.get("file") or "")
    if not load and file.endswith(".safetensors"):
        load = f"from safetensors.torch import load_file\n\nweights = load_file({file!r})"
    code = f"<h3>How to load it</h3><pre>{escape(str(load))}</pre>" if load else ""
    return f'<div class="card"><dl>{"".join(items)}</dl></div>{code}'


def _training(curves: Mapping[str, Curves], figures: Mapping[str, str]) -> str:
    """A summary and the curves of each stage, in the order in which the stages appear."""
    others = [name for name in figures if name != "pareto" and name.removeprefix("loss_") not in curves]
    if not curves and not others:
        return '<p class="soft">No training has been logged.</p>'
    lines = "".join(_stage_summary(stage, logged) for stage, logged in curves.items())
    names = ["Stage", "Last step", "Loss, first", "Loss, last tenth", "Images/s", "Step (s)", "Waiting for data"]
    head = "".join(f"<th{' class=n' if i else ''}>{name}</th>" for i, name in enumerate(names))
    table = f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div><br>'
    drawn = "".join(_figure(figures, name) for name in [*(f"loss_{stage}" for stage in curves), *others])
    return (table if curves else "") + drawn


def _stage_summary(stage: str, curves: Curves) -> str:
    """One table line: how far a stage went, where its loss ended and how fast it ran (means over the stage)."""
    loss = curves.finite("loss")
    tail = loss[-max(1, len(loss) // 10) :]
    step, wait, speed = (_mean(curves.finite(name)) for name in ("step_time_s", "data_wait_s", "images_per_s"))
    cells = [
        str(curves.steps[-1]) if curves.steps else "–",
        f"{loss[0]:.3f}" if loss else "–",
        f"{_mean(tail):.3f}" if loss else "–",
        "–" if speed is None else f"{speed:,.0f}",
        "–" if step is None else f"{step:.3f}",
        "–" if not step or wait is None else f"{100 * wait / step:.1f} %",
    ]
    return f"<tr><td>{escape(stage)}</td>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in cells)}</tr>"


def _numbers(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The finite values of one field."""
    values = (line.get(name) for line in lines)
    return [float(value) for value in values if isinstance(value, int | float) and abs(value) < float("inf")]


def _mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def _provenance(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """Which command made what, when, and how long it took."""
    if not artifacts:
        return '<p class="soft">No artifact is known.</p>'
    lines = []
    for item in artifacts:
        rest = {
            name: value for name, value in item.items() if name not in ("stage", "id", "created", "seconds", "command")
        }
        more = f"<details><summary>more</summary>{_pairs(rest)}</details>" if rest else ""
        stage, name = (escape(_text(item.get(field, ""))) for field in ("stage", "id"))
        lines.append(
            f"<tr><td>{stage}</td><td><code>{name}</code></td>"
            f"<td class=n>{escape(_when(item.get('created')))}</td><td class=n>{_duration(item.get('seconds'))}</td>"
            f'<td class="wrap"><code>{escape(_text(item.get("command", "")))}</code>{more}</td></tr>'
        )
    total = sum(_numbers(artifacts, "seconds"))
    return (
        f"<p>{len(artifacts)} artifacts, {_duration(total)} in all.</p>"
        '<div class="panel"><table><thead><tr><th>Stage</th><th>Artifact</th><th class="n">Created</th>'
        '<th class="n">Took</th>'
        f"<th>Command</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _config(config: Mapping[str, Any]) -> str:
    """The configuration, folded, one fold for each first part of the dotted keys."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in config.items():
        group = name.split(".")[0] if "." in name else "general"
        groups.setdefault(group, {})[name] = value
    return "".join(
        f"<details><summary>{escape(group)} ({len(values)})</summary>{_pairs(values)}</details>"
        for group, values in groups.items()
    )


def _pairs(values: Mapping[str, Any]) -> str:
    """Names and values as a two-column table; empty for nothing."""
    if not values:
        return ""
    lines = "".join(
        f"<tr><td>{escape(str(name))}</td><td><code>{escape(_text(value))}</code></td></tr>"
        for name, value in _flat(values)
    )
    return f'<div class="panel"><table class="pairs"><tbody>{lines}</tbody></table></div>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as pairs with dotted names."""
    result: list[tuple[str, Any]] = []
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        result += _flat(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return result


def _text(value: Any) -> str:
    """A value as a person writes it: lists by commas, yes and no for truth values."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_text(inner)}" for name, inner in _flat(value))
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner) for inner in value)
    return "none" if value is None else str(value)


def _when(created: Any) -> str:
    """A time as text: seconds since 1970 become UTC, text stays."""
    if isinstance(created, int | float):
        return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "–" if created is None else str(created)


def _duration(seconds: Any) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 20 s, 5 h 12 min."""
    if not isinstance(seconds, int | float):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _figure(figures: Mapping[str, str], name: str) -> str:
    """An SVG on a white card, its ids made unique in the page; empty where the figure is missing."""
    if name not in figures:
        return ""
    svg = figures[name][max(0, figures[name].find("<svg")) :]
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda found: f"{found[0]}{prefix}-", svg)
    return f'<figure role="img" aria-label="{escape(name.replace("_", " "))}">{svg}</figure>'
