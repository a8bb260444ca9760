"""The style sheet of the page: no scripts, no fonts to fetch, light and dark, readable from 360 pixels on."""

STYLE = """
:root { color-scheme: light dark;
  --paper:#faf9f6; --card:#fffffe; --ink:#1f2328; --muted:#6b7078; --grid:#e4e2dc; --hair:#dedbd3;
  --plug:#0f766e; --emulator:#b45309; --zero:#7d828b; --full:#4f46e5; --good:#166534; --goodbg:#dcf3e3; --bad:#9f1239;
  --badbg:#fde2e6; --bundle:#d9a066; --patch:#b8a13c; --adapter:#3f9c92; --update:#7b76e0; --metrics:#94a3b8;
  --c0:#2563eb; --c1:#d97706; --c2:#059669; --c3:#db2777; --c4:#7c3aed; --c5:#0891b2; --c6:#65a30d; --c7:#dc2626; }
@media (prefers-color-scheme: dark) { :root {
  --paper:#15171a; --card:#1c1f23; --ink:#e6e4df; --muted:#9a9ea6; --grid:#2d3136; --hair:#31353b;
  --plug:#3cc4b4; --emulator:#eaa04c; --zero:#8f949c; --full:#a5a1f8; --good:#86dba5; --goodbg:#17382a; --bad:#fda4b4;
  --badbg:#45202a; --bundle:#c28a4e; --patch:#b09a45; --adapter:#3fa297; --update:#8680ea; --metrics:#8592a5;
  --c0:#6ea3ff; --c1:#f0b355; --c2:#4bd0a0; --c3:#f47fb8; --c4:#b795f8; --c5:#4fc6df; --c6:#a6d64f; --c7:#f98080; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1060px; margin: 0 auto; padding: 3.2rem 1.5rem 4rem; }
.kicker { margin: 0 0 .9rem; color: var(--muted); font-size: .85rem; letter-spacing: .02em; }
.kicker b { color: var(--ink); font-weight: 600; }
h1 { margin: 0 0 .7rem; max-width: 24em; font-size: clamp(1.55rem, 4.2vw, 2.3rem); line-height: 1.22; font-weight: 620;
  letter-spacing: -.015em; text-wrap: balance; }
.lead { margin: 0; max-width: 56em; font-size: 1.06rem; }
.chip { display: inline-block; margin-right: .55rem; padding: .05rem .6rem; border-radius: 1rem; font-size: .86rem;
  font-weight: 600; white-space: nowrap; background: var(--grid); }
.chip.good { color: var(--good); background: var(--goodbg); } .chip.bad { color: var(--bad); background: var(--badbg); }
.tiles { display: grid; grid-template-columns: repeat(var(--n), 1fr); gap: 1px; margin: 2.2rem 0 0;
  background: var(--hair); border: 1px solid var(--hair); border-radius: 10px; overflow: hidden; }
.tiles div { padding: .95rem 1.1rem 1rem; background: var(--card); }
.tiles dt { color: var(--muted); font-size: .84rem; }
.tiles dd { margin: .1rem 0 0; font-size: .84rem; color: var(--muted); line-height: 1.4; }
.tiles dd b { display: block; color: var(--ink); font-size: 1.75rem; line-height: 1.3; font-weight: 600;
  letter-spacing: -.02em; }
h2 { margin: 3.2rem 0 .3rem; font-size: 1.22rem; font-weight: 620; letter-spacing: -.005em; }
h3 { margin: 0 0 .1rem; font-size: .98rem; font-weight: 600; }
p.about { margin: 0 0 1rem; color: var(--muted); max-width: 62em; font-size: .94rem; }
.stack { display: grid; gap: 1.1rem; align-content: start; }
.card { background: var(--card); border: 1px solid var(--hair); border-radius: 10px; padding: 1.1rem 1.2rem; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.1rem; }
.grid > .wide { grid-column: 1 / -1; }
figure { margin: 0; display: flex; flex-direction: column; } figure > div { margin-top: auto; }
 figure p.about { font-size: .86rem; margin-bottom: .6rem; line-height: 1.45; }
svg.plot { display: block; width: 100%; height: auto; overflow: visible; } svg.plot * { stroke-linejoin: round; }
svg.plot text { font-family: inherit; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .5rem 0 0; padding: 0; list-style: none;
  font-size: .86rem; } .legend li { display: flex; align-items: center; gap: .45rem; overflow-wrap: anywhere; }
.legend i { flex: none; width: 1.25rem; height: 0; border-top: 2.5px solid; }
.legend i.dashed { border-top-style: dashed; border-top-width: 2px; }
.legend i.dotted { border-top-style: dotted; }
.legend i.box { width: .75rem; height: .75rem; border: 0; border-radius: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem .5rem 0; text-align: left; vertical-align: baseline; border-top: 1px solid var(--hair); }
thead th { border-top: 0; padding-top: 0; color: var(--muted); font-size: .84rem; font-weight: 500; }
tbody th { font-weight: 500; } td.n, th.n { text-align: right; white-space: nowrap; }
th.n { white-space: normal; } td.free { overflow-wrap: anywhere; min-width: 6.5rem; }
.card > p.about:last-child { margin-bottom: 0; }
td:last-child, th:last-child { padding-right: 0; } h3 + .scroll, h3 + .two { margin-top: .6rem; }
tfoot td, tfoot th { font-weight: 600; border-top-color: var(--muted); }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1.6rem; }
table.rows tr.plug_in th, table.rows tr.plug_in td { font-weight: 650; }
table.rows td.bar, table.rows th.bar { width: 48%; padding-left: 1.6rem; } table.rows td.bar { vertical-align: middle; }
.scale { display: flex; justify-content: space-between; }
.track { position: relative; display: block; height: 1.25rem; margin: 0 3.6rem; }
.track::before { content: ""; position: absolute; left: var(--at); top: -.55rem; bottom: -.55rem;
  border-left: 1.5px dashed var(--zero); }
.track i { position: absolute; top: .1rem; bottom: .1rem; border-radius: 2px; min-width: 2px; }
.track span { position: absolute; line-height: 1.25rem; white-space: nowrap; font-size: .88rem; padding: 0 .45rem; }
.track span.left { transform: translateX(-100%); }
.meter { display: block; height: .5rem; border-radius: 3px; background: var(--grid); min-width: 5rem; }
.meter i { display: block; height: 100%; border-radius: 3px; background: var(--zero); min-width: 2px; }
dl.list { margin: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
dl.list > div { display: grid; grid-template-columns: minmax(7rem, 42%) 1fr; gap: 1rem; padding: .32rem 0;
  border-bottom: 1px solid var(--hair); break-inside: avoid; } dl.list > div:last-child { border-bottom: 0; }
.card > table tr:first-child > * { border-top: 0; }
dl.list dt, dl.list dd { margin: 0; overflow-wrap: anywhere; } dl.list dt { color: var(--muted); }
.two dl.list { columns: 2; column-gap: 2.6rem; }
details { margin-top: 1.1rem; } summary { cursor: pointer; color: var(--muted); font-size: .94rem; }
details[open] summary { margin-bottom: .8rem; }
table.samples { width: auto; min-width: 100%; } table.samples td, table.samples th { padding-right: 1.1rem; }
table.samples tbody td, table.samples tbody th { white-space: nowrap; } section > .card + .card { margin-top: 1.1rem; }
table.samples i { font-style: normal; margin-right: .35rem; }
table.samples.texts tbody td { vertical-align: top; }
table.samples.texts tbody td:first-child { white-space: normal; min-width: 19rem; font-size: .88rem; }
table.samples td.right { color: var(--good); } table.samples td.wrong { color: var(--bad); }
table.samples thead th { vertical-align: bottom; } table.samples thead b { color: var(--ink); }
table.samples img { display: block; width: 3.6rem; height: 3.6rem; object-fit: contain; margin-bottom: .3rem;
  border-radius: 4px; image-rendering: pixelated; background: var(--grid); }
ul.notes { margin: .4rem 0 0; padding-left: 1.1rem; } ul.notes li { margin: .25rem 0; overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--hair); color: var(--muted);
  font-size: .88rem; } footer p { margin: 0 0 .4rem; max-width: 56em; }
@media (max-width: 820px) { .grid { grid-template-columns: minmax(0, 1fr); } .tiles { grid-template-columns: 1fr 1fr; }
  .tiles div:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .two dl.list { columns: 1; } table.rows td.bar, table.rows th.bar { width: 40%; } }
@media (max-width: 620px) { main { padding: 1.8rem 1rem 3rem; } .card { padding: .9rem; } h2 { margin-top: 2.4rem; }
  .tiles div { padding: .75rem .85rem; } .tiles dd b { font-size: 1.4rem; }
  table.rows, table.rows tbody, table.rows thead { display: block; }
  table.rows tr { display: grid; grid-template-columns: 1fr 5rem 5.8rem; border-top: 1px solid var(--hair); }
  table.rows.one tr { grid-template-columns: 1fr 5rem; } table.rows thead tr { border-top: 0; }
  table.rows th, table.rows td { border-top: 0; padding-right: 0; }
  table.rows th.bar, table.rows td.bar { grid-column: 1 / -1; width: auto; padding: .1rem 0 .6rem; }
  table.rows thead th.bar { padding-bottom: 0; } .track::before { top: -.1rem; bottom: -.35rem; } }
@media print { body { background: none; } .card, figure, tr { break-inside: avoid; } main { padding: 0; } }
"""
