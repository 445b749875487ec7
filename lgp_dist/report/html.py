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
from lgp_dist.report.rows import amount, decimals, flops_unit, kind_label, kind_of, kinds, pareto_front
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
    """SVG by the names of `plots.report_figures`."""
    ledger: Ledger | None = None
    artifacts: Sequence[Mapping[str, Any]] = ()
    """Of each complete stage: stage, id, created, seconds, command and other fields."""
    descendant: PathRow | None = None
    """The exported path."""
    export_folder: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Flat, with dotted keys."""
    environment: Mapping[str, Any] = field(default_factory=dict)


def render_report(report: RunReport) -> str:
    """The whole report as HTML. All data is escaped except the figures, which must be our own."""
    sections = [
        ("headline", "Headline", _headline(report.rows, report.before)),
        ("pareto", "Accuracy against cost", _figure(report.figures, "pareto")),
        ("paths", "All paths", _paths(report)),
        ("descendant", "Descendant", _descendant(report.descendant, report.export_folder)),
        ("training", "Training", _training(report.curves, report.figures)),
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


def _headline(rows: Sequence[PathRow], before: Sequence[PathRow]) -> str:
    """Cards: best path, smallest path, number of paths, change by fine-tuning."""
    if not rows:
        return '<p class="soft">No path has been evaluated yet.</p>'
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
    if change := _changes(rows, before):
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
    parts = [(row["low_row"], row["low"]), (row["high_row"], row["high"])]
    boxes = [f'<i class="r{index % 4}"></i>' * blocks for index, blocks in parts if index is not None and blocks]
    return f'<span class="strip" aria-hidden="true">{"<i class=s></i>".join(boxes)}</span>'


def _descendant(row: PathRow | None, folder: str) -> str:
    """The exported path, its numbers, and how to load it."""
    if row is None:
        return '<p class="soft">No descendant has been exported yet.</p>'
    fields = {
        "Path": row["key"],
        "Parameters": amount(row["params"]),
        "Multiply-adds": amount(row["flops"]),
        "Top-1": f"{row['top1']:.2f} %",
        "Top-5": f"{row['top5']:.2f} %",
        "Folder": folder,
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in fields.items())
    load = f"<h3>How to load it</h3><pre>{escape(LOAD.format(folder=folder))}</pre>"
    return f'<div class="card"><dl>{items}</dl></div>{load}'


def _training(curves: Mapping[str, Curves], figures: Mapping[str, str]) -> str:
    """A summary and the curves of each stage."""
    if not curves:
        return '<p class="soft">No training has been logged.</p>'
    heads = ["Stage", "Last step", "Loss, first", "Loss, last tenth", "Images/s", "Step (s)", "Waiting for data"]
    lines = [_stage_summary(stage, logged) for stage, logged in curves.items()]
    return f"{_table(heads, lines)}<br>" + "".join(_figure(figures, f"loss_{stage}") for stage in curves)


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
    """Which command made each artifact, when, and how long it took."""
    if not artifacts:
        return '<p class="soft">No stage is complete.</p>'
    lines = []
    for item in artifacts:
        stage, name, created, command = (escape(str(item[part])) for part in ("stage", "id", "created", "command"))
        rest = {part: item[part] for part in item if part not in ("stage", "id", "created", "seconds", "command")}
        more = f"<details><summary>more</summary>{_pairs(rest)}</details>" if rest else ""
        lines.append(
            f"<tr><td>{stage}</td><td><code>{name}</code></td><td>{created}</td><td>{_duration(item['seconds'])}</td>"
            f'<td class="wrap"><code>{command}</code>{more}</td></tr>'
        )
    total = _duration(sum(item["seconds"] for item in artifacts))
    heads = ["Stage", "Artifact", "Created", "Took", "Command"]
    return f"<p>{len(artifacts)} artifacts, {total} in total.</p>{_table(heads, lines, left=len(heads))}"


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


def _duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _figure(figures: Mapping[str, str], name: str) -> str:
    """An SVG on a white card, its ids made unique in the page; empty if the figure is missing."""
    if name not in figures:
        return ""
    svg = figures[name][max(0, figures[name].find("<svg")) :]
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda found: f"{found[0]}{prefix}-", svg)
    return f'<figure role="img" aria-label="{escape(name.replace("_", " "))}">{svg}</figure>'
