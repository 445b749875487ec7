"""The report of a run as one HTML file that needs no network and no other files."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean
from typing import Any

from lgp_dist.paths.ledger import Ledger, PathDraws, under_drawn
from lgp_dist.report.curves import Curves
from lgp_dist.report.page import CSS, SCRIPT
from lgp_dist.report.rows import (
    amount,
    date,
    decimals,
    duration,
    flops_unit,
    kind_label,
    kind_of,
    kinds,
    pareto_front,
    visits,
)
from lgp_dist.run.path_rows import PathRow

LOAD = """\
import timm
import lgp_dist.timm_models  # makes stitched paths known to timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
"""


@dataclass(frozen=True)
class RunReport:
    """What the report shows. A section whose data is missing says so or is left out."""

    title: str
    rows: Sequence[PathRow] = ()
    before: Sequence[PathRow] = ()
    """The paths before fine-tuning."""
    curves: Mapping[str, Curves] = field(default_factory=dict)
    """Metrics of each stage."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """SVG by the names of `plots.report_figures`, in the order in which they are shown."""
    ledger: Ledger | None = None
    artifacts: Sequence[Mapping[str, Any]] = ()
    """Of each complete stage: stage, id, created, seconds, command and other fields."""
    overview: Mapping[str, str] = field(default_factory=dict)
    """What the run is, by label."""
    ancestry: Mapping[str, Any] = field(default_factory=dict)
    """Facts of its stage."""
    descendant: PathRow | None = None
    """The chosen path."""
    budget: str = ""
    """Why it was chosen."""
    export_folder: str = ""
    """Of the chosen path; empty if it was not exported."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Flat, with dotted keys."""
    environment: Mapping[str, Any] = field(default_factory=dict)


def render_report(report: RunReport) -> str:
    """The whole report as HTML. All data is escaped except the figures, which must be our own."""
    sections = [
        ("headline", "Headline", _headline(report)),
        ("pareto", "Accuracy against cost", _figures(report.figures, "pareto")),
        ("paths", "All paths", _paths(report)),
        ("descendant", "Descendant", _descendant(report)),
        ("training", "Training", _training(report)),
        ("draws", "Draws of each path", draws_section(report.ledger)),
        ("provenance", "Provenance", _provenance(report.artifacts)),
        ("environment", "Environment", _pairs(report.environment)),
        ("config", "Configuration", _config(report.config)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in shown)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    title = escape(report.title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><main>"
        f"<h1>{title}</h1><nav>{links}</nav>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _table(heads: Sequence[str], lines: Sequence[str], css: str = "", left: int = 1) -> str:
    """heads: HTML. lines: of `_line`. css: class of the table; `sortable` sorts at a click. left: columns of text."""
    head = "".join(f"<th{' class=n' if column >= left else ''}>{text}</th>" for column, text in enumerate(heads))
    body = f"<tbody>{''.join(lines)}</tbody>"
    return f'<div class="panel"><table class="{css}"><thead><tr>{head}</tr></thead>{body}</table></div>'


def _line(cells: Sequence[tuple[Any, str]], css: str = "", left: int = 1) -> str:
    """A table's line. cells: the value to sort by, and HTML. left: columns of text; the others hold numbers."""
    parts = (
        f'<td{" class=n" if column >= left else ""} data-v="{escape(str(value))}">{content}</td>'
        for column, (value, content) in enumerate(cells)
    )
    attribute = f' class="{css}"' if css else ""
    return f"<tr{attribute}>{''.join(parts)}</tr>"


def _number(value: float | None, form: str) -> tuple[Any, str]:
    """A cell with a number, or a dash for None."""
    return ("", "–") if value is None else (value, format(value, form))


def _headline(report: RunReport) -> str:
    """Cards of paths, and what the run is."""
    cards = _cards(report) if report.rows else '<p class="soft">No path has been evaluated yet.</p>'
    return cards + _terms(report.overview)


def _terms(values: Mapping[str, str]) -> str:
    """Labels and values on a card; empty without any."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())
    return f'<div class="card terms"><dl>{items}</dl></div>' if items else ""


def _cards(report: RunReport) -> str:
    """Cards: best path, smallest path, ancestry, number of paths, change by fine-tuning."""
    rows = report.rows
    best = max(rows, key=lambda row: (row["top1"], -row["flops"]))
    smallest = min(rows, key=lambda row: (row["params"], -row["top1"]))
    stitched = sum(row["stitch"] is not None for row in rows)

    def size(row: PathRow) -> str:
        sizes = f"{amount(row['params'])} parameters<br>{amount(row['flops'])} multiply-adds"
        return f"<code>{escape(row['key'])}</code><br>{sizes}"

    cards = [
        ("Best path, top-1", f"{best['top1']:.2f} %", size(best)),
        ("Smallest path, top-1", f"{smallest['top1']:.2f} %", size(smallest)),
        ("Paths evaluated", str(len(rows)), f"{stitched} stitched, {len(rows) - stitched} rows alone"),
        ("On the Pareto front", str(len(pareto_front(rows))), "no other path is as accurate with fewer FLOPs"),
    ]
    if "top1" in report.ancestry:
        note = f"the frozen teacher<br>{amount(report.ancestry['params'])} parameters"
        cards.insert(2, ("Ancestry, top-1", f"{report.ancestry['top1']:.2f} %", note))
    if change := _changes(rows, report.before):
        worse = sum(value < 0 for value in change.values())
        note = f"points, mean over {len(change)} paths; {worse} got worse"
        cards.append(("Change by fine-tuning, top-1", f"{fmean(change.values()):+.2f}", note))
    return '<div class="cards">{}</div>'.format(
        "".join(
            f'<div class="card"><span class="label">{label}</span><b>{value}</b><span class="note">{note}</span></div>'
            for label, value, note in cards
        )
    )


def _changes(rows: Sequence[PathRow], before: Sequence[PathRow]) -> dict[str, float]:
    """Points of top-1 that each path gained in fine-tuning, for paths evaluated before and after."""
    old = {row["key"]: row["top1"] for row in before}
    return {row["key"]: row["top1"] - old[row["key"]] for row in rows if row["key"] in old}


def _paths(report: RunReport) -> str:
    """The table of all paths, cheapest first, with the Pareto front tinted."""
    rows = report.rows
    if not rows:
        return ""
    divisor, letter = flops_unit(rows)
    all_kinds, change = kinds(rows), _changes(rows, report.before)
    front = {row["key"] for row in pareto_front(rows)}
    chosen = report.descendant["key"] if report.descendant else None
    params = f".{decimals(row['params'] / 1e6 for row in rows)}f"
    flops = f".{decimals(row['flops'] / divisor for row in rows)}f"
    lines = []
    for row in sorted(rows, key=lambda row: (row["flops"], -row["top1"], row["key"])):
        key, on_front = row["key"], row["key"] in front
        kind, top1 = kind_label(kind_of(row), all_kinds), f"{row['top1']:.2f}"
        badge = ' <span class="badge">chosen</span>' if key == chosen else ""
        cells = [
            (int(not on_front), "★" if on_front else ""),
            (key, f"<code>{escape(key)}</code>{badge}"),
            (f"{row['low']:04}{row['high']:04}", _strip(row)),
            (kind, kind),
            _number(row["stitch"], "d"),
            _number(row["params"] / 1e6, params),
            _number(row["params_paper"] / 1e6, params),
            _number(row["flops"] / divisor, flops),
            (row["top1"], f"<strong>{top1}</strong>" if on_front else top1),
            _number(row["top5"], ".2f"),
        ]
        if change:
            points, (value, text) = change.get(key, 0.0), _number(change.get(key), "+.2f")
            cells.append((value, f'<span class="{"down" if points < 0 else "up"}">{text}</span>'))
        lines.append(_line(cells, " ".join(["front"] * on_front + ["chosen"] * (key == chosen)), left=4))
    heads = ['<span title="on the Pareto front">★</span>', "Path", "Blocks", "Kind", "Stitch", "Params (M)"]
    heads += ["Params in papers (M)", f"FLOPs ({letter})", "Top-1 (%)", "Top-5 (%)", *(["Change"] if change else [])]
    return (
        '<p class="soft">★ and tint: on the Pareto front of top-1 against FLOPs. FLOPs are multiply-adds. '
        "Published tables do not count class token and position embedding of stitched paths. "
        f"Click a heading to sort.</p>{_table(heads, lines, 'sortable', left=4)}"
    )


def _strip(row: PathRow) -> str:
    """A path's blocks as small boxes, one colour for each row of the pool."""
    boxes = [f'<i class="r{index % 4}"></i>' * blocks for index, blocks in visits(row)]
    return f'<span class="strip" aria-hidden="true">{"<i class=s></i>".join(boxes)}</span>'


def _descendant(report: RunReport) -> str:
    """The chosen path, the budget, its numbers, and how to load it."""
    row = report.descendant
    if row is None:
        return '<p class="soft">No path has been chosen yet.</p>'
    fields = {
        "Path": row["key"],
        "Budget": report.budget,
        "Parameters": amount(row["params"]),
        "Multiply-adds": amount(row["flops"]),
        "Latency": f"{row['latency_ms']:.3g} ms, {row['latency_on']}" if "latency_ms" in row else "",
        "Top-1": f"{row['top1']:.2f} %",
        "Top-5": f"{row['top5']:.2f} %",
        "Folder": report.export_folder or "not exported yet",
    }
    load = f"<h3>How to load it</h3><pre>{escape(LOAD.format(folder=report.export_folder))}</pre>"
    return _terms({name: value for name, value in fields.items() if value}) + (load if report.export_folder else "")


def _training(report: RunReport) -> str:
    """A summary and the curves of each stage."""
    curves, figures = report.curves, report.figures
    if not curves:
        return '<p class="soft">No training has been logged.</p>'
    heads = ["Stage", "Last step", "Loss, first", "Loss, last tenth", "Images/s", "Step (s)", "Waiting for data"]
    lines = [_stage_summary(stage, logged) for stage, logged in curves.items()]
    unmeasured = "finetune" in curves and "validation_finetune" not in figures
    note = "Accuracy was not measured while training: <code>--finetune.watch-every STEPS</code> does it."
    drawn = "".join(_figures(figures, "loss", "parts", "validation", stage=stage) for stage in curves)
    return f"{_table(heads, lines)}{drawn}" + (f'<p class="soft">{note}</p>' if unmeasured else "")


def _stage_summary(stage: str, curves: Curves) -> str:
    """A stage's last step, its loss, and means of its speed, step time and share of waiting."""
    loss = curves.finite("loss")
    tail = loss[-max(1, len(loss) // 10) :]
    logged = (curves.finite(name) for name in ("step_time_s", "data_wait_s", "images_per_s"))
    step, wait, speed = (fmean(values) if values else None for values in logged)
    cells = [
        (stage, escape(stage)),
        _number(curves.steps[-1], "d"),
        _number(loss[0] if loss else None, ".3f"),
        _number(fmean(tail) if tail else None, ".3f"),
        _number(speed, ",.0f"),
        _number(step, ".3f"),
        _number(wait / step if step and wait is not None else None, ".1%"),
    ]
    return _line(cells)


def draws_section(ledger: Ledger | None) -> str:
    """The ledger of stage finetune; empty without one. Under-drawn paths are marked and named above the table."""
    if not ledger or not ledger["paths"]:
        return ""
    heads = ["Path", "Draws", "Share (%)", "Expected (%)", "Ranks, fewest to most", "Last step"]
    note = f"{ledger['draws']:,} draws in {ledger['steps']:,} steps. Shares differ from the expected ones by chance"
    warning = ""
    if late := under_drawn(ledger):
        names = ", ".join(f"<code>{escape(key)}</code>" for key in late)
        warning = f'<p><strong class="down">Drawn less often</strong> than chance explains: {names}.</p>'
    else:
        note += "; no path was drawn less often than chance explains"
    table = _table(heads, [_draws_line(path) for path in ledger["paths"]], "sortable")
    return f'{warning}<p class="soft">{note}.</p>{table}'


def _draws_line(path: PathDraws) -> str:
    mark = ' <span class="badge down">under-drawn</span>' if path["behind"] else ""
    ranks, last = path["ranks"] or [0], path["last_step"]
    cells = [
        (path["key"], f"<code>{escape(path['key'])}</code>{mark}"),
        _number(path["draws"], ",d"),
        _number(100 * path["share"], ".2f"),
        _number(100 * path["expected_share"], ".2f"),
        (min(ranks), f"{min(ranks):,} to {max(ranks):,}"),
        (-1, "never") if last is None else _number(last, ",d"),
    ]
    return _line(cells)


def _provenance(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """When each artifact was made, how long it took, and the commands, each of them once."""
    if not artifacts:
        return '<p class="soft">No stage is complete.</p>'
    lines, commands = [], dict[str, list[str]]()
    for item in artifacts:
        commands.setdefault(str(item["command"]), []).append(str(item["stage"]))
        took, short = duration(item["seconds"]), (str(item.get(name) or "none")[:12] for name in ("id", "commit"))
        cells = [item["stage"], *short, date(str(item["created"])), took, item.get("world")]
        lines.append(_line([(cell, escape(str(cell))) for cell in cells], left=6))
    total = duration(sum(item["seconds"] for item in artifacts))
    heads = ["Stage", "Artifact", "Commit", "Created", "Took", "Ranks"]
    table = _table(heads, lines, "plain", left=len(heads))
    shown = "".join(
        f"<h3>Command of {escape(', '.join(stages))}</h3><pre class=wrap>{escape(_lines(command))}</pre>"
        for command, stages in commands.items()
    )
    return f"<p>{len(artifacts)} artifacts, {total} in total.</p>{table}{shown}"


def _lines(command: str) -> str:
    """A long command with a line for each option, as a shell takes it."""
    return command if len(command) < 100 or "'" in command else command.replace(" --", " \\\n    --")


def _config(config: Mapping[str, Any]) -> str:
    """The configuration, folded by the first part of the dotted keys."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in config.items():
        group = name.split(".")[0] if "." in name else "general"
        groups.setdefault(group, {})[name] = value
    return "".join(
        f"<details><summary>{escape(group)} ({len(values)})</summary>{_pairs(values)}</details>"
        for group, values in groups.items()
    )


def _pairs(values: Mapping[str, Any]) -> str:
    """Names and values as a table of two columns; empty without names."""
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(_text(value))}</code></td></tr>" for name, value in _flat(values)
    )
    return f'<div class="panel"><table class="pairs"><tbody>{lines}</tbody></table></div>' if lines else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs with dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    """A value as a person writes it: lists with commas, yes and no for truth values."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner) for inner in value)
    return "none" if value is None else str(value)


def _figures(figures: Mapping[str, str], *kinds: str, stage: str = "") -> str:
    """The figures of a kind, or those of a stage, next to each other where there is room."""
    drawn = "".join(
        _figure(name, svg)
        for name, svg in figures.items()
        if (name in [f"{kind}_{stage}" for kind in kinds] if stage else name.startswith(kinds))
    )
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def _figure(name: str, svg: str) -> str:
    """An SVG on a white card, its ids made unique in the page."""
    svg = svg[max(0, svg.find("<svg")) :]
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda found: f"{found[0]}{prefix}-", svg)
    return f'<figure role="img" aria-label="{escape(name.replace("_", " "))}">{svg}</figure>'
