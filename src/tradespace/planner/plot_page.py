"""The page that `plot.py` fills: plain HTML, SVG drawn by a script of its own. %TITLE% and %DATA% are replaced."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>%TITLE%: tradespace</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;margin:24px auto;max-width:980px;padding:0 16px;color:#1d2330;background:#fff}
h1{font-size:21px;margin:0 0 2px}p{margin:2px 0 12px;color:#566}svg{width:100%;height:auto;display:block}
.axis{stroke:#aab;stroke-width:1}.grid{stroke:#e6e9f0}.tick{fill:#566;font-size:12px}.label{fill:#334;font-size:13px}
.key{display:inline-flex;align-items:center;gap:6px;margin:0 14px 4px 0;border:0;background:none;font:inherit;color:inherit;cursor:pointer;padding:2px}
.key[aria-pressed=false]{opacity:.35}.dot{width:12px;height:12px;border-radius:50%;display:inline-block}
#tip{position:fixed;pointer-events:none;background:#1d2330;color:#fff;padding:6px 9px;border-radius:5px;font-size:13px;max-width:420px;visibility:hidden}

table{border-collapse:collapse;width:100%;font-size:13px;margin-top:8px}td,th{text-align:left;padding:2px 8px 2px 0}td.n{text-align:right}
td:first-child{width:18px}
@media(prefers-color-scheme:dark){body{background:#14171e;color:#dfe3ec}p,.tick,.label{color:#9aa6ba;fill:#9aa6ba}.grid{stroke:#262c38}}
</style></head><body>
<h1 id="title"></h1><p id="sub"></p><div id="keys"></div><svg id="plot" viewBox="0 0 940 440" role="img" aria-label="bytes against decode speed"></svg>
<h1 id="barTitle"></h1><svg id="bar" viewBox="0 0 940 90" role="img" aria-label="ledger against the budget"></svg><table id="ledger"></table>
<div id="tip" role="tooltip"></div>
<script>
const d = %DATA%;
const NS = "http://www.w3.org/2000/svg", hidden = new Set(), $ = id => document.getElementById(id);
const add = (to, name, set, text) => {
  const e = document.createElementNS(NS, name);
  for (const key in set) e.setAttribute(key, set[key]);
  if (text !== undefined) e.textContent = text;
  to.appendChild(e);
  return e;
};
const size = b => b >= 2 ** 30 ? +(b / 2 ** 30).toPrecision(3) + " GiB" : +(b / 2 ** 20).toPrecision(3) + " MiB";
const tip = (e, lines) => {
  const show = event => {
    const t = $("tip");
    t.textContent = lines.join(" \\u00b7 ");
    t.style.visibility = "visible";
    t.style.left = Math.min(event.clientX + 14, innerWidth - 430) + "px";
    t.style.top = event.clientY + 12 + "px";
  };
  e.addEventListener("mousemove", show);
  e.addEventListener("mouseleave", () => $("tip").style.visibility = "hidden");
  add(e, "title", {}, lines.join("\\n"));
};
$("title").textContent = d.title + ": the frontier";
$("sub").textContent = `Budget ${d.budget_text}. ${d.frontier.length} plans that no other beats in bytes, speed and loss; plans they beat in grey.` +
  (d.unplaced ? ` ${d.unplaced} of unknown speed are not drawn.` : "") + (d.best ? " The ring marks the chosen plan." : " Nothing fits.");
const all = d.frontier.map(p => [p.bytes, p.speed]).concat(d.behind, d.best && d.best.speed ? [[d.best.bytes, d.best.speed]] : []);
const span = i => {
  const v = all.map(p => p[i]), low = Math.min(...v), high = Math.max(...v);
  return [low / 1.15, Math.max(high * 1.15, low * 1.6)];
};
const draw = () => {
  const svg = $("plot");
  svg.replaceChildren();
  if (!all.length) { add(svg, "text", {x: 470, y: 200, "text-anchor": "middle", class: "label"}, "no plan of known speed"); return; }
  const [x0, x1] = span(0), [y0, y1] = span(1), L = 70, R = 900, T = 14, B = 392;
  const x = v => L + (Math.log(v / x0) / Math.log(x1 / x0)) * (R - L), y = v => B - (Math.log(v / y0) / Math.log(y1 / y0)) * (B - T);
  for (let i = 0; i <= 5; i++) {
    const vx = x0 * (x1 / x0) ** (i / 5), vy = y0 * (y1 / y0) ** (i / 5);
    add(svg, "line", {x1: x(vx), x2: x(vx), y1: T, y2: B, class: "grid"});
    add(svg, "line", {x1: L, x2: R, y1: y(vy), y2: y(vy), class: "grid"});
    add(svg, "text", {x: x(vx), y: B + 17, "text-anchor": "middle", class: "tick"}, size(vx));
    add(svg, "text", {x: L - 7, y: y(vy) + 4, "text-anchor": "end", class: "tick"}, vy >= 100 ? Math.round(vy) : +vy.toPrecision(2));
  }
  add(svg, "text", {x: (L + R) / 2, y: 432, "text-anchor": "middle", class: "label"}, "bytes over all devices (logarithmic)");
  add(svg, "text", {x: 16, y: 200, transform: "rotate(-90 16 200)", "text-anchor": "middle", class: "label"}, "decode, tokens a second (logarithmic)");
  for (const [b, s] of d.behind) add(svg, "circle", {cx: x(b), cy: y(s), r: 2, fill: "#99a", opacity: .25});
  const say = p => [p.text, p.size, p.speed.toPrecision(3) + " tok/s",
    p.loss === null ? "loss unknown" : p.loss === 0 ? "exact" : "loss " + p.loss.toPrecision(2) + " nats a token", p.runs ? "runs" : "priced, cannot run yet"];
  for (const p of d.frontier) if (!hidden.has(p.band)) {
    const e = add(svg, "circle", {cx: x(p.bytes), cy: y(p.speed), r: 6, fill: d.colours[p.band], class: "point", "data-band": p.band,
      stroke: "#fff", "fill-opacity": p.runs ? 1 : .65});
    tip(e, say(p));
  }
  if (d.best && d.best.speed) {
    add(svg, "circle", {cx: x(d.best.bytes), cy: y(d.best.speed), r: 6, fill: d.colours[d.best.band]});
    const ring = add(svg, "circle", {cx: x(d.best.bytes), cy: y(d.best.speed), r: 11, fill: "transparent", stroke: "#d1006c", "stroke-width": 3, id: "best"});
    tip(ring, ["chosen", ...say(d.best)]);
  }
};
d.bands.forEach((name, band) => {
  const key = document.createElement("button"), dot = document.createElement("span");
  key.className = "key"; key.setAttribute("aria-pressed", "true");
  dot.className = "dot"; dot.style.background = d.colours[band];
  key.append(dot, name);
  key.onclick = () => {
    hidden.has(band) ? hidden.delete(band) : hidden.add(band);
    key.setAttribute("aria-pressed", String(!hidden.has(band)));
    draw();
  };
  $("keys").append(key);
});
draw();
const shades = ["#2166ac", "#4393c3", "#92c5de", "#5aae61", "#a6dba0", "#fdb863", "#e08214", "#b2abd2", "#8073ac", "#c51b7d", "#999"];
if (d.best) {
  $("barTitle").textContent = `Its ledger: ${size(d.peak)} at the peak of ${d.pool}${d.degree > 1 ? ", each of " + d.degree : ""}, against ${d.budget_text}`;
  const total = d.ledger.reduce((sum, line) => sum + line.bytes, 0), scale = 900 / Math.max(d.budget, total), svg = $("bar");
  let at = 20;
  add(svg, "rect", {x: 20, y: 24, width: d.budget * scale, height: 38, fill: "none", stroke: "#889", "stroke-dasharray": "4 3"});
  d.ledger.forEach((line, i) => {
    const e = add(svg, "rect", {x: at, y: 24, width: Math.max(.5, line.bytes * scale), height: 38, fill: shades[i % shades.length], class: "segment"});
    tip(e, [line.name, line.size, line.phase]);
    at += line.bytes * scale;
  });
  add(svg, "text", {x: 20 + d.budget * scale, y: 80, "text-anchor": "end", class: "tick"}, "budget " + d.budget_text);
  const table = $("ledger");
  for (const [i, line] of d.ledger.entries()) {
    const row = table.insertRow(), mark = document.createElement("span");
    mark.className = "dot"; mark.style.background = shades[i % shades.length];
    row.insertCell().append(mark);
    row.insertCell().textContent = line.name;
    const bytes = row.insertCell(); bytes.className = "n"; bytes.textContent = line.size;
    row.insertCell().textContent = line.phase;
  }
}
</script></body></html>
"""
