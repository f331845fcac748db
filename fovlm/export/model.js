// The worker of the page: the model's three graphs, the cache of its one context, and the loop over frames.
//
// A message {id, task, ...} gets {id, done: ...} or {id, error}, and {id, part} before that where there is progress:
//   load                the settings of the model; parts are bytes loaded and bytes in all
//   start {question}    an empty context; a model that was trained so reads the question ahead of the frames
//   see {pixels}        one frame as RGBA of frame_size x frame_size, which becomes one token of the cache
//   ask {question}      an answer about the frames so far; parts are the answer as it grows. The cache forgets it again
import * as ort from "./ort.wasm.min.mjs";
import { Tokenizer } from "./tokenizers.min.mjs";

const FIRST = 0, STATIC = 1, HIDDEN = 2; // where the query of a look comes from
const ROWS = 256; // tokens by which the cache grows
const NONE = new Float32Array(0);

let settings, tokenizer, graphs, wasm;
let cache = NONE, n, hidden, seen, first; // rows of keys and values, tokens in it, the last state, frames, question

// What the model's memory takes can be read from WebAssembly's alone.
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(size) { super(size); wasm = this }
};

const json = async file => (await fetch(file)).json();
const f32 = (data, dims) => new ort.Tensor("float32", data, dims);
const i64 = numbers => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [numbers.length]);
const encode = text => tokenizer.encode(text, { add_special_tokens: false }).ids;

const load = async (_, report) => {
  settings = await json("settings.json");
  tokenizer = new Tokenizer(...await Promise.all(["tokenizer.json", "tokenizer_config.json"].map(json)));
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const total = Object.values(settings.graphs).reduce((a, b) => a + b);
  let loaded = 0;
  graphs = {};
  for (const [name, size] of Object.entries(settings.graphs)) {
    const response = await fetch(`${name}.onnx`), bytes = new Uint8Array(size);
    if (!response.ok) throw Error(`${name}.onnx: ${response.status} ${response.statusText}`);
    let at = 0;
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      bytes.set(value, at);
      at += value.length;
      loaded += value.length;
      report([loaded, total]);
    }
    graphs[name] = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  }
  return settings;
};

// Reads visual tokens, then words, behind the cache; returns the logits of the word `scored` (none: []).
const read = async (visual, words, scored = []) => {
  const { E, row } = settings;
  const out = await graphs.llm.run({
    visual: f32(visual, [visual.length / E, E]), words: i64(words), scored: i64(scored),
    memory: f32(cache.subarray(0, n * row), [n, row]),
  });
  const added = out.new.dims[0];
  if ((n + added) * row > cache.length) {
    const larger = new Float32Array((Math.ceil((n + added) / ROWS)) * ROWS * row);
    larger.set(cache.subarray(0, n * row));
    cache = larger;
  }
  cache.set(out.new.data, n * row);
  n += added;
  hidden = out.hidden.data;
  return out.logits.data;
};

const state = () => ({
  seen, tokens: n, room: settings.context - settings.reserve - n, cache: n * settings.row * 4,
  wasm: wasm?.buffer.byteLength, threads: ort.env.wasm.numThreads,
});

const start = async ({ question }) => {
  [n, seen, hidden, cache, first] = [0, 0, null, NONE, question];
  if (settings.before) await read(NONE, encode(settings.text[0] + question));
  return state();
};

const see = async ({ pixels }) => {
  if (state().room < 1) return { full: true, ...state() };
  const s = settings.frame_size, planes = new Uint8Array(3 * s * s), began = performance.now();
  for (let i = 0; i < s * s; i++) for (let c = 0; c < 3; c++) planes[c * s * s + i] = pixels[4 * i + c];
  const encoded = await graphs.encoder.run({ frame: new ort.Tensor("uint8", planes, [1, 3, s, s]) });
  const kind = settings.coarse ? STATIC : hidden ? HIDDEN : FIRST;
  const look = await graphs.look.run({
    hidden: f32(hidden ?? new Float32Array(settings.E), [1, settings.E]), kind: i64([kind]), cache: encoded.cache,
  });
  await read(look.token.data, []);
  seen++;
  // The mean over layers and heads of the weight of each patch; CLS and registers come before the patches.
  const [layers, heads, N] = look.weights.dims, patches = settings.side ** 2, map = new Float32Array(patches);
  for (let l = 0; l < layers * heads; l++) for (let p = 0; p < patches; p++) map[p] += look.weights.data[(l + 1) * N - patches + p] / (layers * heads);
  return { map, ms: performance.now() - began, ...state() };
};

const wordsOf = question => {
  const [before, after] = settings.text;
  if (!settings.before) return encode(before + question + after);
  // The turn of the first question is still open: another one is a new line of it.
  return [...(question === first ? [] : encode(`\n${question}`)), ...encode(after)];
};

const ask = async ({ question }, report) => {
  const [tokens, last] = [n, hidden], words = wordsOf(question), ids = [], began = performance.now();
  if (n + words.length >= settings.context) throw Error("the question does not fit into the context");
  let logits = await read(NONE, words, [words.length - 1]), text = "", firstMs;
  for (;;) {
    const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
    firstMs ??= performance.now() - began;
    if (settings.ends.includes(best) || ids.length === settings.tokens || n >= settings.context) break;
    ids.push(best);
    text = tokenizer.decode(ids, { skip_special_tokens: true });
    report(text);
    logits = await read(NONE, [best], [0]);
  }
  [n, hidden] = [tokens, last];
  return { text, ids, firstMs, ms: performance.now() - began, ...state() };
};

const tasks = { load, start, see, ask };
let turn = Promise.resolve(); // one task after the other
addEventListener("message", ({ data }) => {
  turn = turn.then(async () => {
    try {
      const done = await tasks[data.task](data, part => postMessage({ id: data.id, part }));
      postMessage({ id: data.id, done });
    } catch (error) {
      postMessage({ id: data.id, error: String(error?.message ?? error) });
    }
  });
});
