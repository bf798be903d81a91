"""Style sheet of the report: one column, light and dark, no external file."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --surface: #ffffff; --line: #e3e6eb; --ink: #1b2330; --muted: #5c6675;
  --grid: #dfe3e9; --heat: #5f93ea; --good: #1d7f4f;
  --series-1: #2563c9; --series-2: #d2691e; --series-3: #1a8f6b;
  --series-4: #8a4fc4; --series-5: #c22f5b; --series-6: #6a7385;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161d; --surface: #1a2029; --line: #2c3542; --ink: #e8ecf2; --muted: #9ba6b5;
    --grid: #333d4b; --heat: #3568a8; --good: #5cc98f;
    --series-1: #6ea5f8; --series-2: #f0975a; --series-3: #55c9a1;
    --series-4: #bd93f0; --series-5: #f07c9d; --series-6: #a5afbe;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
    sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 56px; }
.eyebrow { margin: 0 0 6px; color: var(--muted); font-size: 14px; }
h1 {
  margin: 0 0 10px; font-size: clamp(26px, 3.6vw, 36px); line-height: 1.2; font-weight: 650;
  letter-spacing: -0.015em; text-wrap: balance;
}
.lead { margin: 0 0 26px; max-width: 72ch; color: var(--muted); }
h2 { margin: 44px 0 14px; font-size: 22px; line-height: 1.3; font-weight: 620; }
h3 { margin: 0 0 2px; font-size: 16px; line-height: 1.35; font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 14px; }
.tile, figure, .card, details {
  background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
}
.tile { padding: 14px 16px 15px; }
.tile b { display: block; font-size: 27px; line-height: 1.25; font-weight: 640;
  letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 14px; color: var(--ink); }
.tile small { display: block; font-size: 13px; line-height: 1.4; color: var(--muted); }
.card { padding: 6px 18px 10px; overflow-x: auto; }
* + .card { margin-top: 16px; }
h2 + .card { margin-top: 0; }
.metrics td:nth-child(2), .metrics th:nth-child(2) { text-align: left; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(430px, 100%), 1fr));
  gap: 16px; margin-top: 16px; }
figure { margin: 0; padding: 16px 18px 12px; min-width: 0; }
figure.wide { margin-top: 16px; }
figcaption { margin-bottom: 8px; }
figcaption p { margin: 0; font-size: 13.5px; line-height: 1.45; color: var(--muted); }
figure svg { display: block; width: 100%; height: auto; }
.plot { overflow-x: auto; }
figure svg text { font-family: inherit !important; }
table { border-collapse: collapse; width: 100%; font-size: 15px;
  font-variant-numeric: tabular-nums; }
th { padding: 10px 12px 8px; font-size: 13px; font-weight: 550; color: var(--muted);
  text-align: right; vertical-align: bottom; }
td { padding: 8px 12px; border-top: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
td.best { font-weight: 680; color: var(--good); }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 9px;
  border-radius: 3px; }
details { margin-top: 16px; padding: 0 18px; }
details.run[open] { padding-bottom: 18px; }
summary { padding: 13px 0; cursor: pointer; font-weight: 600; }
summary small { margin-left: 8px; font-weight: 400; color: var(--muted); }
details details { margin-top: 16px; }
details.run figure, details.run details { border-color: var(--line); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr));
  gap: 0 28px; margin: 0 0 14px; font-size: 14px; }
dl div { display: flex; justify-content: space-between; gap: 14px; padding: 5px 0;
  border-top: 1px solid var(--line); min-width: 0; }
dt { color: var(--muted); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.layers { margin-bottom: 12px; }
.layers td, .layers th { padding-top: 4px; padding-bottom: 4px; font-size: 13.5px; }
.card.account { padding: 14px 18px; margin-top: 16px; }
.account ul { margin: 4px 0 0; padding: 0; list-style: none; font-size: 15px; }
.log td { padding-top: 5px; padding-bottom: 5px; font-size: 14px; vertical-align: top; }
.log .word { text-align: left; }
.log .words { min-width: 9em; text-align: left; white-space: normal; overflow-wrap: anywhere; }
.log td:last-child.words { min-width: 20em; }
.log tr.again td { color: var(--muted); }
code { font: 0.93em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 40px; padding-top: 16px; border-top: 1px solid var(--line);
  font-size: 13.5px; color: var(--muted); }
footer p { margin: 0 0 6px; max-width: 84ch; }
/* Text of a picture that is shrunk to a phone's width cannot be read: it scrolls instead. */
@media (max-width: 620px) {
  main { padding: 24px 14px 40px; }
  figure { padding: 14px 14px 10px; }
  .card { padding: 4px 14px 8px; }
  details { padding: 0 14px; }
  details.run { padding: 0 10px; }
  .log td:not(:first-child), .log th:not(:first-child) { padding-left: 7px; }
  .log td, .log th { padding-right: 7px; }
  .log .words { min-width: 8em; }
  .log td:last-child.words { min-width: 14em; }
  .plot svg { min-width: 300px; }
  .wide .plot svg { width: 860px; }
}
@media print { body { background: none; } figure, .tile { break-inside: avoid; } }
"""
