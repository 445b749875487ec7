"""The report's table of draws: how often each path was trained."""

from collections.abc import Mapping
from html import escape
from typing import Any


def draws_section(ledger: Mapping[str, Any] | None) -> str:
    """The ledger of stage finetune as HTML: path, draws, share against expected, last step; empty without a ledger.

    Paths that fell behind are marked and named above the table.
    """
    if not ledger or not ledger["paths"]:
        return ""
    late = [path["key"] for path in ledger["paths"] if path["behind"]]
    lines = "".join(_line(path) for path in ledger["paths"])
    heads = ["Draws", "Share (%)", "Expected (%)", "Ranks, fewest to most", "Last step"]
    head = "<th>Path</th>" + "".join(f'<th class="n">{text}</th>' for text in heads)
    note = f"{ledger['draws']:,} draws in {ledger['steps']:,} steps. A share differs from what is expected by chance"
    if late:
        names = ", ".join(f"<code>{escape(key)}</code>" for key in late)
        warning = f'<p><strong class="down">Fell behind</strong>, by more than chance explains: {names}.</p>'
    else:
        warning = ""
        note += "; no path fell behind"
    return (
        f'{warning}<p class="soft">{note}.</p>'
        f'<div class="panel"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _line(path: Mapping[str, Any]) -> str:
    mark = ' <span class="badge down">behind</span>' if path["behind"] else ""
    ranks, last = path["ranks"] or [0], path["last_step"]
    cells = [
        (path["draws"], f"{path['draws']:,}"),
        (path["share"], f"{100 * path['share']:.2f}"),
        (path["expected_share"], f"{100 * path['expected_share']:.2f}"),
        (min(ranks), f"{min(ranks):,} to {max(ranks):,}"),
        (-1 if last is None else last, "never" if last is None else f"{last:,}"),
    ]
    rest = "".join(f'<td class="n" data-v="{value}">{text}</td>' for value, text in cells)
    return f'<tr><td data-v="{escape(path["key"])}"><code>{escape(path["key"])}</code>{mark}</td>{rest}</tr>'
