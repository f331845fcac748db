"use strict";
// Draws what html.py put into #data. Letters: K looks, layers x H heads, side x side patches.
const data = JSON.parse(document.getElementById("data").textContent);
const { K, H, layers, side, stops, darken, gazes } = data;
const N = side * side, MEAN = -1, UP = 8;  // UP: pixels per patch of the smooth maps
const $ = id => document.getElementById(id);
const make = (tag, attributes = {}, text = "") => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;  // never as HTML: questions and answers are untrusted
  return node;
};
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const colours = ["var(--a)", "var(--b)"];

// A pane for the fine looks of each gaze, and one for the coarse looks, which are the same for every question.
const panes = gazes.filter(g => g.fine).map((g, i) => ({ name: "fine", gaze: g, colour: colours[i], map: g.fine }));
panes.push({ name: "coarse", gaze: gazes.length === 1 || !gazes[0].fine ? gazes[0] : null, colour: "var(--coarse)", map: data.coarse });
for (const pane of panes) {
  pane.u8 = bytes(pane.map.u8);  // [layers, K, H, N]
  pane.most = new Float32Array(bytes(pane.map.most).buffer);  // [layers, K, H]: the weight of 255
}
const images = data.frames.map(source => { const image = new Image(); image.src = source; return image });
let look = 0, timer = null;

const chosen = () => {
  const l = +$("layer").value, h = +$("head").value, range = (n, all) => n === MEAN ? [...Array(all).keys()] : [n];
  return { ls: range(l, layers), hs: range(h, H) };
};
// The mean of `f` over the chosen layers and heads.
const mean = f => {
  const { ls, hs } = chosen();
  let sum = 0;
  for (const l of ls) for (const h of hs) sum += f(l, h);
  return sum / (ls.length * hs.length);
};
const mapOf = (pane, k) => {
  const { ls, hs } = chosen(), out = new Float32Array(N);
  for (const l of ls) for (const h of hs) {
    const at = (l * K + k) * H + h, scale = pane.most[at] / 255 / (ls.length * hs.length);
    for (let n = 0; n < N; n++) out[n] += pane.u8[at * N + n] * scale;
  }
  return out;
};
const numberOf = (pane, what, k) => mean((l, h) => pane.map[what][(l * K + k) * H + h]);

// Catmull-Rom between the centers of the patches, exact at every center.
const taps = Array.from({ length: side * UP }, (_, i) => {
  const x = (i + .5) / UP - .5, base = Math.floor(x), t = x - base;
  const w = [-.5 * t + t * t - .5 * t ** 3, 1 - 2.5 * t * t + 1.5 * t ** 3, .5 * t + 2 * t * t - 1.5 * t ** 3, -.5 * t * t + .5 * t ** 3];
  return w.map((weight, j) => [Math.min(side - 1, Math.max(0, base - 1 + j)), weight]);
});
const smooth = map => {
  const S = side * UP, wide = new Float32Array(side * S), out = new Float32Array(S * S);
  for (let y = 0; y < side; y++) for (let x = 0; x < S; x++) for (const [n, w] of taps[x]) wide[y * S + x] += w * map[y * side + n];
  for (let y = 0; y < S; y++) for (const [n, w] of taps[y]) for (let x = 0; x < S; x++) out[y * S + x] += w * wide[n * S + x];
  return out;
};
const light = Array.from({ length: 256 }, (_, i) => {
  const x = i / 255 * (stops.length - 1), n = Math.min(stops.length - 2, Math.floor(x));
  return stops[n].map((c, j) => c + (stops[n + 1][j] - c) * (x - n));
});
const veil = document.createElement("canvas");
veil.width = veil.height = side * UP;
const draw = pane => {
  const canvas = pane.canvas, context = canvas.getContext("2d"), map = mapOf(pane, look), strength = $("alpha").value / 100;
  const most = $("scale").value === "clip" ? pane.brightest : Math.max(...map);
  context.globalAlpha = 1;
  context.drawImage(images[data.frame_of_look[look]], 0, 0, canvas.width, canvas.height);
  context.fillStyle = `rgba(0,0,0,${darken * Math.min(1, strength * 1.35)})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  const pixels = new ImageData(veil.width, veil.height), values = smooth(map);
  for (let i = 0; i < values.length; i++) {
    const v = Math.max(0, Math.min(1, values[i] / (most || 1))), [r, g, b] = light[Math.round(v * 255)];
    pixels.data.set([r, g, b, 255 * v], i * 4);
  }
  veil.getContext("2d").putImageData(pixels, 0, 0);
  context.globalAlpha = strength;
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(veil, 0, 0, canvas.width, canvas.height);
  const cls = numberOf(pane, "cls", look), percent = x => (100 * x).toFixed(x < .0995 ? 1 : 0) + " %";
  pane.facts.textContent = `brightest patch ${percent(Math.max(...map))} · CLS ${percent(cls)} · entropy ${numberOf(pane, "entropy", look).toFixed(2)}`;
  canvas.setAttribute("aria-label", `${pane.name} look at frame ${look + 1}: ${pane.facts.textContent}`);
};
// The clip's brightest patch in any pane, so that panes are comparable; changes with layer and head.
const measure = () => {
  let most = 0;
  for (const pane of panes) for (let k = 0; k < K; k++) most = Math.max(most, ...mapOf(pane, k));
  for (const pane of panes) pane.brightest = most;
};

const SVG = "http://www.w3.org/2000/svg";
const chart = () => {
  const svg = $("chart"), W = svg.clientWidth || 600, T = 150, left = 40, right = 12, top = 10, bottom = 20;
  const lines = panes.map(pane => Array.from({ length: K }, (_, k) => numberOf(pane, "entropy", k)));
  let low = Math.min(...lines.flat()), high = Math.max(...lines.flat());
  const pad = Math.max(.02, (high - low) * .15);
  low = Math.max(0, low - pad); high = Math.min(1, high + pad);
  const x = k => K === 1 ? (left + W - right) / 2 : left + k * (W - left - right) / (K - 1), y = v => top + (high - v) / (high - low) * (T - top - bottom);
  const add = (tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    svg.append(node);
  };
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${W} ${T}`);
  for (const v of [low, (low + high) / 2, high]) {
    add("line", { x1: left, x2: W - right, y1: y(v), y2: y(v), stroke: "var(--line)" });
    add("text", { x: left - 5, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(2));
  }
  add("text", { x: x(0), y: T - 5 }, data.times[0]);
  if (K > 1) add("text", { x: x(K - 1), y: T - 5, "text-anchor": "end" }, data.times[K - 1]);
  panes.forEach((pane, i) => {
    add("polyline", { points: lines[i].map((v, k) => `${x(k)},${y(v)}`).join(" "), fill: "none", stroke: pane.colour, "stroke-width": 2, "stroke-linejoin": "round" });
    add("circle", { cx: x(look), cy: y(lines[i][look]), r: 4, fill: pane.colour });
  });
  add("line", { id: "mark", x1: x(look), x2: x(look), y1: top, y2: T - bottom, stroke: "var(--soft)", "stroke-dasharray": "3 3" });
  svg.jump = event => {
    const at = (event.clientX - svg.getBoundingClientRect().left - left) / (W - left - right);
    show(Math.round(Math.min(1, Math.max(0, at)) * (K - 1)));
  };
};

const show = k => {
  look = Math.min(K - 1, Math.max(0, k));
  $("at").value = look;
  $("now").textContent = `${data.times[look]} · ${look + 1} of ${K}`;
  panes.forEach(draw);
  chart();
  for (const token of document.querySelectorAll(".t.frame")) token.setAttribute("aria-current", String(+token.dataset.look === look));
};
const play = on => {
  clearInterval(timer);
  timer = on ? setInterval(() => show((look + 1) % K), 500) : null;
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", on ? "pause" : "play");
};
const choose = () => { measure(); show(look) };

$("about").textContent = data.about;
for (const pane of panes) {
  const box = make("figure", { class: "pane", "data-kind": pane.name, style: `--colour: ${pane.colour}` });
  pane.canvas = make("canvas", { width: 448, height: 448, role: "img" });
  pane.facts = make("p", { class: "facts" });
  const says = make("div", { class: "says" });
  const [name, note] = pane.name === "fine"
    ? ["Fine", " · queries of the language model"]
    : ["Coarse", " · one query for all frames"];
  const title = make("p");
  title.append(make("b", {}, name), make("span", {}, note));
  says.append(title);
  const shown = pane.name === "fine" ? [pane.gaze] : gazes.some(g => g.fine) ? [] : gazes;
  for (const { question, answer } of shown.filter(gaze => gaze.question)) {
    says.append(make("p", { class: "q" }, question), make("p", { class: "ans" }, answer || "(empty answer)"));
  }
  box.append(pane.canvas, pane.facts, says);
  $("panes").append(box);
  const entry = make("span", { style: `--colour: ${pane.colour}` });
  entry.append(make("i"), pane.name === "fine" && panes.length > 2 ? `fine: ${pane.gaze.question}` : pane.name);
  $("key").append(entry);
}
const options = (id, count, one) => {
  $(id).append(make("option", { value: MEAN }, "mean of all"));
  for (let n = 0; n < count; n++) $(id).append(make("option", { value: n }, one(n)));
  $(id).addEventListener("change", choose);
};
options("layer", layers, n => `${n}${layers > 1 && n === 0 ? " (first)" : ""}${layers > 1 && n === layers - 1 ? " (last)" : ""}`);
options("head", H, n => `${n}`);
gazes.forEach((gaze, i) => {
  const colour = gaze.fine ? colours[i] : "var(--coarse)", box = make("div", { class: "stream", style: `--colour: ${colour}` });
  $("streams").append(make("h2", {}, `What the language model reads, token by token${gazes.length > 1 ? `: ${gaze.question}` : ""}`), box);
  for (const [kind, text, k] of gaze.tokens) {
    if (kind !== "frame") { box.append(make("span", { class: `t ${kind}`, title: kind }, text.replaceAll("\n", "↵"))); continue }
    const button = make("button", { type: "button", class: "t frame", "data-look": k, title: data.times[k], "aria-label": `frame ${k + 1}` });
    button.append(make("img", { src: data.frames[data.frame_of_look[k]], alt: "" }));
    button.addEventListener("click", () => show(k));
    box.append(button);
  }
});
$("at").max = K - 1;
$("at").addEventListener("input", () => { play(false); show(+$("at").value) });
$("alpha").addEventListener("input", () => panes.forEach(draw));
$("scale").addEventListener("change", () => panes.forEach(draw));
$("play").addEventListener("click", () => play(!timer));
$("chart").addEventListener("pointerdown", event => { play(false); $("chart").jump(event) });
$("chart").addEventListener("pointermove", event => { if (event.buttons) $("chart").jump(event) });
addEventListener("resize", chart);
addEventListener("keydown", event => {
  const on = event.target, busy = on.tagName === "SELECT" || on.id === "alpha" || event.ctrlKey || event.metaKey || event.altKey;
  const to = { ArrowLeft: look - 1, ArrowRight: look + 1, Home: 0, End: K - 1 }[event.key];
  if (busy) return;
  if (to !== undefined) { event.preventDefault(); play(false); show(to) }
  if (event.key === " " && on.tagName !== "BUTTON" && on.tagName !== "SUMMARY") { event.preventDefault(); play(!timer) }
});
Promise.all(images.map(image => image.decode())).then(() => { choose(); document.body.dataset.ready = "yes" });
