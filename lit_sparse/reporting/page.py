"""The frame of the report: its HTML, style sheet and the few lines of script that sort the table."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@title@</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #1c2430; --soft: #5d6878; --line: #dfe3e9;
  --mark: #2f74b5; --tint: #dbe9f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b212a; --ink: #e6eaf0; --soft: #98a3b3; --line: #2f3845;
    --mark: #6aaae4; --tint: #24405c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 78rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 .15rem; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 1.05rem; }
h3 { margin: 0; font-size: .8rem; font-weight: 600; color: var(--soft); }
p { margin: 0; }
.path, figcaption p, .words, .note, footer, section > p { color: var(--soft); font-size: .85rem; }
.path { overflow-wrap: anywhere; }
code, .path { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0 .75rem; }
dl div { min-width: 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.arguments { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0; padding: 0; list-style: none; font-size: .82rem; }
.arguments li {
  padding: .1rem .55rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--card);
  overflow-wrap: anywhere;
}
.arguments span { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tile, figure, section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .8rem 1rem; }
.value { font-size: 1.65rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.bar { height: .3rem; margin: .15rem 0 .35rem; border-radius: .2rem; background: var(--tint); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--mark); }
.figures { display: flex; flex-wrap: wrap; gap: .75rem; }
figure { flex: 1 1 27rem; margin: 0; padding: 1rem; min-width: min(100%, 20rem); }
figure.wide { flex-basis: 100%; }
.picture { margin-top: .75rem; overflow-x: auto; }
.picture svg {
  display: block; margin: 0 auto; width: 100%; min-width: var(--least); max-width: var(--most); height: auto;
  fill: currentColor;
}
.panels { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; }
.panels .picture { flex: 1 1 24rem; min-width: 0; }
.picture text { font-family: inherit; }
section { margin-top: .75rem; padding: 1rem; }
.scroll { margin-top: .6rem; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { position: sticky; left: 0; background: var(--card); text-align: left; font-weight: 500; }
tbody tr:hover > * { background: var(--tint); }
td.rank { background: linear-gradient(90deg, var(--tint) var(--share), transparent var(--share)); }
thead button {
  all: unset; cursor: pointer; font-weight: 650; color: var(--soft);
}
thead button:focus-visible { outline: 2px solid var(--mark); }
thead [aria-sort=ascending] button::after { content: " ▲"; }
thead [aria-sort=descending] button::after { content: " ▼"; }
.note { margin-top: .5rem; }
footer { margin-top: 1.25rem; }
@media (max-width: 40rem) {
  body { padding: 1.25rem .75rem 2rem; }
  h1 { font-size: 1.3rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: .5rem; }
  .tile { padding: .6rem .75rem; }
  .value { font-size: 1.35rem; }
  th:first-child { min-width: 9rem; white-space: normal; overflow-wrap: anywhere; }
}
</style>
</head>
<body>
<header>
<h1>@title@</h1>
<p class="path">@source@</p>
<dl>@facts@</dl>
@arguments@
</header>
<main>
<div class="tiles">
@tiles@
</div>
<div class="figures">
@figures@
</div>
<section>
<h2>Layers</h2>
@table@
@notes@
</section>
</main>
<footer>Written by lit_sparse @version@ from A, B and gates alone.</footer>
<script>
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = document.querySelector("tbody"), place = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.children[place];
      return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    };
    const order = (a, b) =>
      typeof a === "number" ? b - a : b.localeCompare(a, undefined, {numeric: true});
    const rows = [...body.rows].sort((a, b) => order(key(a), key(b)));
    body.append(...(down ? rows : rows.reverse()));
  });
}
</script>
</body>
</html>
"""
