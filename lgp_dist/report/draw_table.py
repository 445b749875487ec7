"""The report's table of draws: how often each path was trained."""

from html import escape

from lgp_dist.paths.ledger import Ledger, PathDraws, under_drawn


def draws_section(ledger: Ledger | None) -> str:
    """The ledger of stage finetune as HTML; empty without one. Under-drawn paths are marked and named above it."""
    if not ledger or not ledger["paths"]:
        return ""
    late = under_drawn(ledger)
    lines = "".join(_line(path) for path in ledger["paths"])
    heads = ["Draws", "Share (%)", "Expected (%)", "Ranks, fewest to most", "Last step"]
    head = "<th>Path</th>" + "".join(f'<th class="n">{text}</th>' for text in heads)
    note = f"{ledger['draws']:,} draws in {ledger['steps']:,} steps. Shares differ from the expected ones by chance"
    if late:
        names = ", ".join(f"<code>{escape(key)}</code>" for key in late)
        warning = f'<p><strong class="down">Drawn less often</strong> than chance explains: {names}.</p>'
    else:
        warning = ""
        note += "; no path was drawn less often than chance explains"
    return (
        f'{warning}<p class="soft">{note}.</p>'
        f'<div class="panel"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _line(path: PathDraws) -> str:
    mark = ' <span class="badge down">under-drawn</span>' if path["behind"] else ""
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
