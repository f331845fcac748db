// The page: frames from the example, a video or the camera go to the worker one by one, one a second of the video as in
// training; where the model looked is drawn as light on each. A question can be asked at any time.
const KEPT = 240; // frames that can be looked at again; the model's context holds more
const $ = id => document.getElementById(id);
const worker = new Worker("model.js", { type: "module" }), waiting = new Map();
let calls = 0, settings, source = 0, looks = [], shown = -1, times = [];

const call = (task, given = {}, onPart = () => {}, transfer = []) => new Promise((resolve, reject) => {
  waiting.set(++calls, { resolve, reject, onPart });
  worker.postMessage({ id: calls, task, ...given }, transfer);
});
worker.onmessage = ({ data: { id, part, done, error } }) => {
  const { resolve, reject, onPart } = waiting.get(id);
  if (part !== undefined) return onPart(part);
  waiting.delete(id);
  error ? reject(Error(error)) : resolve(done);
};
const complain = error => { $("error").textContent = error.message ?? error };
worker.onerror = event => complain(event.message || "the worker did not start");
const number = x => x.toLocaleString("en-US", { maximumFractionDigits: x < 10 ? 1 : 0 });

// -- frames -----------------------------------------------------------------------------------------------------------

const small = document.createElement("canvas"), pen = small.getContext("2d", { willReadFrequently: true });
// The shorter side is scaled to frame_size and the middle is taken, as in training.
const fit = (picture, width, height) => {
  const s = small.width, side = Math.min(width, height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, (width - side) / 2, (height - side) / 2, side, side, 0, 0, s, s);
  return pen.getImageData(0, 0, s, s);
};
const clock = t => `${Math.floor(t / 60)}:${String(Math.floor(t % 60)).padStart(2, "0")}`;
const once = (target, event) => new Promise((resolve, reject) => {
  target.addEventListener(event, resolve, { once: true });
  target.addEventListener("error", () => reject(Error("this browser cannot read the video")), { once: true });
});
async function* example() {
  for (const [k, file] of settings.example.entries()) {
    const picture = new Image();
    picture.src = file;
    await picture.decode();
    yield [fit(picture, picture.naturalWidth, picture.naturalHeight), `frame ${k + 1}`];
  }
}
async function* film(file) {
  const video = document.createElement("video"), url = URL.createObjectURL(file);
  Object.assign(video, { muted: true, preload: "auto", src: url });
  try {
    await once(video, "loadeddata");
    for (let t = 0; t === 0 || t < video.duration - .001; t++) {
      if (t) { video.currentTime = t; await once(video, "seeked") }
      yield [fit(video, video.videoWidth, video.videoHeight), clock(t)];
    }
  } finally { URL.revokeObjectURL(url) }
}
async function* camera() {
  const stream = await navigator.mediaDevices.getUserMedia({ video: true });
  const video = Object.assign(document.createElement("video"), { muted: true, srcObject: stream });
  try {
    await video.play();
    for (const began = performance.now(); ;) {
      const t = (performance.now() - began) / 1000;
      yield [fit(video, video.videoWidth, video.videoHeight), clock(t)];
      await new Promise(resolve => setTimeout(resolve, Math.max(0, 1000 * (t + 1) - (performance.now() - began))));
    }
  } finally { stream.getTracks().forEach(track => track.stop()) }
}

const watch = async (frames, ends) => {
  const mine = ++source, question = $("question").value.trim();
  $("error").textContent = $("note").textContent = "";
  if (settings.before && !question) return complain("this model reads the question ahead of the frames: write one first");
  [looks, shown, times] = [[], -1, []];
  $("strip").replaceChildren();
  $("answers").replaceChildren();
  $("stop").disabled = false;
  try {
    await call("start", { question });
    for await (const [image, label] of frames) {
      if (mine !== source) return;
      const seen = await call("see", { pixels: image.data });
      if (mine !== source) return;
      if (seen.full) { $("note").textContent = `The context is full: ${number(seen.seen)} frames. Questions can still be asked.`; break }
      add(image, label, seen);
    }
    if (ends && question) await ask(question);
  } catch (error) { complain(error) } finally { if (mine === source) $("stop").disabled = true }
};

// -- what is seen -----------------------------------------------------------------------------------------------------

const light = v => {
  const x = Math.min(1, v) * (settings.stops.length - 1), i = Math.min(settings.stops.length - 2, Math.floor(x));
  return settings.stops[i].map((c, j) => c + (settings.stops[i + 1][j] - c) * (x - i));
};
const draw = (canvas, { image, map }) => {
  const context = canvas.getContext("2d"), veil = new OffscreenCanvas(settings.side, settings.side);
  const pixels = new ImageData(settings.side, settings.side), most = Math.max(...map);
  map.forEach((w, i) => pixels.data.set([...light(w / most), 255 * w / most], 4 * i));
  veil.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingQuality = "high";
  pen.putImageData(image, 0, 0);
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  context.fillStyle = `rgba(0,0,0,${settings.darken})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalAlpha = settings.alpha;
  context.drawImage(veil, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
};
const show = look => {
  shown = look;
  draw($("frame"), look);
  $("facts").textContent = `${look.label} · brightest patch ${number(100 * Math.max(...look.map))} % · patches ${number(100 * look.map.reduce((a, b) => a + b))} %, the rest on CLS`;
  $("frame").setAttribute("aria-label", $("facts").textContent);
  for (const each of looks) each.button.setAttribute("aria-current", each === look);
};
const add = (image, label, seen) => {
  const follows = shown === -1 || shown === looks.at(-1), button = document.createElement("button");
  const thumb = Object.assign(document.createElement("canvas"), { width: 56, height: 56 });
  const look = { image, label, map: seen.map, button };
  Object.assign(button, { type: "button", title: label, onclick: () => show(look) });
  button.append(thumb);
  draw(thumb, look);
  looks.push(look);
  $("strip").append(button);
  if (looks.length > KEPT) looks.shift().button.remove();
  if (follows) { show(look); $("strip").scrollTop = $("strip").scrollHeight }
  times = [...times, seen.ms].slice(-20);
  report(seen);
};
const report = ({ seen, tokens, room, cache, wasm, threads }) => {
  const heap = performance.memory?.usedJSHeapSize, perFrame = settings.row * 4 / 1e3;
  const facts = {
    frames: times.length ? `${number(seen)}, ${number(1000 * times.length / times.reduce((a, b) => a + b))} a second on ${threads} thread${threads > 1 ? "s" : ""}` : "0",
    context: `${number(tokens)} of ${number(settings.context)} tokens, room for ${number(Math.max(0, room))} more frames`,
    cache: `${number(cache / 1e3)} kB, ${number(perFrame)} kB a frame`,
    memory: [wasm && `${number(wasm / 1e6)} MB in WebAssembly`, heap && `${number(heap / 1e6)} MB heap`].filter(Boolean).join(", ") || "not shown by this browser",
  };
  $("state").replaceChildren(...Object.entries(facts).flatMap(pair => pair.map((text, i) => Object.assign(document.createElement(i ? "dd" : "dt"), { textContent: text, id: i ? `of-${pair[0]}` : "" }))));
};

// -- questions --------------------------------------------------------------------------------------------------------

const ask = async question => {
  const [q, a] = ["q", "ans"].map(name => Object.assign(document.createElement("p"), { className: name }));
  q.textContent = question;
  $("answers").prepend(q, a);
  const done = await call("ask", { question }, text => { a.textContent = text });
  a.textContent = done.text || "(empty answer)";
  Object.assign(a.dataset, { first: Math.round(done.firstMs), done: Math.round(done.ms), tokens: done.ids.length });
  a.title = `first token after ${number(done.firstMs)} ms, ${done.ids.length} tokens in ${number(done.ms)} ms`;
};
$("form").onsubmit = event => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (question) ask(question).catch(complain);
};
$("example").onclick = () => watch(example(), true);
$("file").onchange = () => { if ($("file").files[0]) watch(film($("file").files[0]), true); $("file").value = "" };
$("camera").onclick = () => watch(camera(), false);
$("stop").onclick = () => { source++; $("stop").disabled = true };

call("load", {}, ([done, total]) => {
  $("loading").firstElementChild.textContent = `loading the model: ${number(done / 1e6)} of ${number(total / 1e6)} MB`;
  $("loading").lastElementChild.value = done / total;
}).then(async given => {
  settings = given;
  small.width = small.height = settings.frame_size;
  $("loading").hidden = true;
  $("about").prepend(`${settings.about}. `);
  $("question").value = settings.question;
  $("example").hidden = !settings.example.length;
  report(await call("start", { question: settings.question }));
  for (const id of ["example", "file", "camera", "ask"]) $(id).disabled = false;
  document.body.dataset.ready = "yes";
}).catch(complain);
