"""The look of the HTML report: one style sheet and one script, both inlined."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5d6672; --line: #dfe3e8; --back: #f6f7f9; --card: #ffffff;
  --accent: #0067a3; --mark: #eef6fb; --r0: #0072b2; --r1: #009e73; --r2: #d55e00; --r3: #cc79a7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4b1; --line: #333a43; --back: #14171b;
  --card: #1c2026; --accent: #6cb8ea; --mark: #1d2c38; --r0: #56b4e9; --r1: #2fbf95; --r2: #f08a4b; --r3: #dd9cc0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 72ch; } .soft, caption { color: var(--soft); }
nav { margin: .8rem 0 1.6rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .9rem; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .9rem 1.1rem 1rem; } .card b { display: block; font-size: 1.7rem; line-height: 1.3; font-weight: 650; }
.card .label { color: var(--soft); font-size: .82rem; } .card .note { font-size: .87rem; overflow-wrap: anywhere; }
.panel { overflow-x: auto; }
.card.terms { margin: .9rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: .9rem;
  margin: .9rem 0; }
figure { margin: 0; max-width: 760px; background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem; }
figure svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .75rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
td.n, th.n { text-align: right; } td.n, .sortable td, .plain td { white-space: nowrap; }
.sortable th, .sortable td { padding-inline: .6rem; } .sortable th { white-space: normal; }
.badge { font-size: .75rem; color: var(--accent); border: 1px solid; border-radius: 9px; padding: 0 .45em; }
dd, .pairs td { overflow-wrap: anywhere; }
tr.front td { background: var(--mark); } tr.front td.n strong { font-weight: 700; }
tr.chosen td:first-child { box-shadow: inset 3px 0 0 var(--accent); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort] button { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace; }
td > code { white-space: nowrap; } .pairs td > code { white-space: pre-wrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; margin: .6rem 0;
  overflow-x: auto; } pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
.strip { display: inline-flex; gap: 2px; align-items: center; }
.strip i { width: 7px; height: 13px; border-radius: 1.5px; background: var(--soft); }
.strip i.s { width: 7px; height: 2px; }
.strip .r0 { background: var(--r0); height: 7px; } .strip .r1 { background: var(--r1); }
.strip .r2 { background: var(--r2); height: 16px; } .strip .r3 { background: var(--r3); height: 18px; }
.up { color: var(--r1); } .down { color: var(--r2); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: .6rem 0; }
summary { cursor: pointer; padding: .6rem 1rem; font-weight: 600; } details > .panel { border: 0; border-radius: 0; }
.pairs td:first-child { width: 32%; color: var(--soft); }
@media print { body { background: #fff; } nav { display: none; } figure, table { break-inside: avoid; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        return x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y);
      };
      const body = table.tBodies[0];
      const rows = [...body.rows].sort(compare);
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}
"""
