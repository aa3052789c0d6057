// The page of a bundle: proof, speed, and what becomes of a photo's tokens.
import * as ort from "./ort/ort.webgpu.min.mjs";
import { fit, prove, readSafetensors, toInput, tokenMaps, withDecisions } from "./tokexport.mjs";

const at = (id) => document.getElementById(id);
const bytes = async (name) => {
  const reply = await fetch(name);
  if (!reply.ok) throw new Error(`${name}: ${reply.status} ${reply.statusText}`);
  return reply.arrayBuffer();
};
const query = new URLSearchParams(location.search);
const state = { report: null, classes: null, map: null };

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 4) : 1;
ort.env.logLevel = "error";

// The session of a file, and what it runs on. externalData: weights that lie beside it.
async function open(content, externalData = []) {
  const wanted = query.get("runtime");
  const adapter = wanted !== "wasm" && navigator.gpu ? await navigator.gpu.requestAdapter().catch(() => null) : null;
  for (const provider of adapter ? ["webgpu", "wasm"] : ["wasm"]) {
    try {
      return { provider, session: await ort.InferenceSession.create(content, { executionProviders: [provider], externalData }) };
    } catch (e) {
      if (provider === "wasm") throw e;
    }
  }
}

async function start() {
  const manifest = await (await fetch("../tokexport.json")).json();
  const p = manifest.provenance, steps = manifest.decisions;
  at("name").textContent = manifest.file.name;
  at("what").textContent = `${p.model}, ${p.schedule.method}, ${manifest.precision}: ${manifest.tokens} tokens`
    + (steps.length ? `, ${steps.at(-1).n_out} after ${steps.length} reductions` : ", none of them merged or dropped");
  const tensors = readSafetensors(await bytes(`../${manifest.proof.file.name}`));
  const file = withDecisions(await bytes(`../${manifest.file.name}`), await bytes("decisions.pb"));
  const beside = manifest.beside.map(async ({ name }) => ({ path: name, data: new Uint8Array(await bytes(`../${name}`)) }));
  const { provider, session } = await open(file, await Promise.all(beside));
  await showProof(manifest, tensors, session, provider);
  take(manifest, session);
  if (query.get("photo")) await showPhoto(manifest, session, await (await fetch(query.get("photo"))).blob());
  await showSpeed(manifest, tensors, session);
}

async function showProof(manifest, tensors, session, provider) {
  const report = await prove(ort, session, manifest, tensors), n = manifest.proof.images;
  state.report = { ...report, provider };
  const words = report.passed ? `Yes, on ${report.judged} of ${n} images (the others: near-ties)` : "No";
  at("proof").textContent = `${report.passed && report.judged === n ? `Yes, on all ${n} images` : words}: ${provider === "webgpu" ? "WebGPU" : "WASM"}, onnxruntime-web ${ort.env.versions?.web ?? ""}`;
  at("proof").className = report.passed ? "passed" : "failed";
  at("faults").replaceChildren(...report.faults.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

function feedOf(manifest, data) {
  const input = manifest.inputs[0], n = input.shape[0] ?? 1, full = new data.constructor(n * data.length);
  for (let k = 0; k < n; k++) full.set(data, k * data.length);
  return { [input.name]: new ort.Tensor(input.type, full, [n, ...input.shape.slice(1)]) };
}

// Milliseconds of a run of each session, in turns, so that whatever else this machine does meets all alike.
async function medians(sessions, feed, rounds = 7) {
  const times = sessions.map(() => []);
  for (let i = -2; i < rounds; i++)
    for (const [k, session] of sessions.entries()) {
      const begin = performance.now();
      await session.run(feed);
      if (i >= 0) times[k].push(performance.now() - begin);
    }
  return times.map((each) => each.sort((a, b) => a - b)[rounds >> 1]);
}

async function showSpeed(manifest, tensors, session) {
  const size = tensors.input.data.length / manifest.proof.images, feed = feedOf(manifest, tensors.input.data.slice(0, size));
  const reply = await fetch("dense.onnx"), sessions = [session];
  if (reply.ok) sessions.push((await open(new Uint8Array(await reply.arrayBuffer()))).session);
  const [own, dense] = await medians(sessions, feed);
  Object.assign(state, { ms: own, dense });
  at("speed").textContent = `${own.toFixed(1)} ms a run (median of seven)`
    + (dense ? `; the dense model ${dense.toFixed(1)} ms: ${(dense / own).toFixed(2)} times as long` : "");
}

async function read(blob, channels) {
  const picture = await createImageBitmap(blob), canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff"; // what is transparent lies on white
  context.fillRect(0, 0, picture.width, picture.height);
  context.drawImage(picture, 0, 0);
  const { data } = context.getImageData(0, 0, picture.width, picture.height);
  const n = picture.width * picture.height, pixels = new Uint8Array(n * channels);
  for (let i = 0; i < n; i++) {
    const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
    if (channels === 3) pixels.set([r, g, b], 3 * i);
    else pixels[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; // as Pillow makes grey
  }
  return { height: picture.height, width: picture.width, channels, pixels };
}

async function showPhoto(manifest, session, blob) {
  const p = manifest.preprocessing, image = await read(blob, p.channels);
  const values = await session.run(feedOf(manifest, toInput(image, p)));
  at("note").textContent = "The browser decoded the photo, in colours that may differ by a little from other decoders; resized as Pillow does.";
  showClasses(manifest, values);
  showMap(manifest, fit(image, p), values);
}

function showClasses(manifest, values) {
  const output = manifest.outputs[0], n = output.shape.at(-1), data = Array.from(values[output.name].data.slice(0, n));
  if (!manifest.classes) {
    const length = Math.hypot(...data);
    const change = state.last ? `; cosine to the photo before: ${(data.reduce((a, v, i) => a + v * state.last[i], 0) / length / Math.hypot(...state.last)).toFixed(4)}` : "";
    state.last = data;
    at("classes").replaceChildren(row([`${n} features, length ${length.toFixed(3)}${change}`]));
    return;
  }
  const largest = Math.max(...data), powers = data.map((v) => Math.exp(v - largest)), sum = powers.reduce((a, b) => a + b, 0);
  const score = { softmax: (i) => `${((100 * powers[i]) / sum).toFixed(1)} %`, sigmoid: (i) => `${(100 / (1 + Math.exp(-data[i]))).toFixed(1)} %`, none: (i) => data[i].toFixed(3) };
  const best = data.map((_, i) => i).sort((a, b) => data[b] - data[a]).slice(0, 5);
  state.classes = best;
  at("classes").replaceChildren(...best.map((i) => row([score[manifest.activation](i), manifest.labels[i] ?? `class ${i}`])));
}

function row(cells) {
  const line = document.createElement("tr");
  cells.forEach((text, i) => line.append(Object.assign(document.createElement("td"), { textContent: text, className: i < cells.length - 1 ? "number" : "" })));
  return line;
}

function showMap(manifest, image, values) {
  const steps = manifest.decisions, [height, width] = manifest.preprocessing.size;
  const maps = steps.length ? tokenMaps(single(values), manifest, 0) : [], [rows, columns] = gridOf(manifest);
  const draw = (canvas, colour) => {
    Object.assign(canvas, { width, height });
    const picture = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) picture.data.set([...colour(i), 255], 4 * i);
    canvas.getContext("2d").putImageData(picture, 0, 0);
  };
  const pixel = (i) => (image.channels === 3 ? image.pixels.subarray(3 * i, 3 * i + 3) : [image.pixels[i], image.pixels[i], image.pixels[i]]);
  draw(at("photo"), pixel);
  at("map").style.display = "block";
  const first = manifest.tokens - rows * columns; // prefix tokens come first
  const show = (k) => {
    const place = maps[k], patchOf = (i) => first + Math.floor((Math.floor(i / width) * rows) / height) * columns + Math.floor(((i % width) * columns) / width);
    const sums = new Map();
    for (let i = 0; i < width * height; i++) {
      const token = place ? place[patchOf(i)] : patchOf(i), entry = sums.get(token) ?? sums.set(token, [0, 0, 0, 0, new Set()]).get(token);
      pixel(i).forEach((v, c) => (entry[c] += v));
      entry[3]++;
      entry[4].add(patchOf(i));
    }
    draw(at("tokens"), (i) => {
      const token = place ? place[patchOf(i)] : patchOf(i), [r, g, b, n, patches] = sums.get(token);
      return token < 0 ? [0, 0, 0] : patches.size === 1 ? pixel(i) : [r / n, g / n, b / n];
    });
    const step = steps[k];
    at("caption").textContent = step ? `after block ${step.block}: ${step.n_out} of ${manifest.tokens} tokens; merged patches in their mean colour, dropped ones black` : "nothing is merged or dropped";
    state.map = { step: k, tokens: step?.n_out ?? manifest.tokens, patches: sums.size };
  };
  Object.assign(at("step"), { max: Math.max(maps.length - 1, 0), value: Math.max(maps.length - 1, 0), oninput: (e) => show(Number(e.target.value)) });
  show(maps.length - 1);
}

// Decisions of a file for one image have no batch axis.
function single(values) {
  return Object.fromEntries(Object.entries(values).map(([name, { dims, data }]) => [name, { data, dims: name.includes(".") && dims.length < 3 ? [1, ...dims] : dims }]));
}

// Rows and columns of patches: as many as there are, in the shape of the image.
function gridOf(manifest) {
  const [height, width] = manifest.preprocessing.size, n = manifest.tokens - manifest.provenance.schedule.n_prefix;
  const rows = Math.max(1, Math.round(Math.sqrt((n * height) / width)));
  return n % rows ? [1, n] : [rows, n / rows];
}

function take(manifest, session) {
  const failure = (e) => (at("note").textContent = `This photo cannot be shown: ${e.message}`);
  const show = (blob) => blob && showPhoto(manifest, session, blob).catch(failure);
  at("file").onchange = (e) => show(e.target.files[0]);
  at("drop").ondragover = (e) => (e.preventDefault(), at("drop").classList.add("over"));
  at("drop").ondragleave = () => at("drop").classList.remove("over");
  at("drop").ondrop = (e) => (e.preventDefault(), at("drop").classList.remove("over"), show(e.dataTransfer.files[0]));
}

start()
  .catch((e) => {
    at("proof").textContent = `The file cannot be run here: ${e.message}`;
    at("proof").className = "failed";
    state.report ??= { passed: false, faults: [e.message] };
  })
  .finally(() => (document.documentElement.dataset.state = JSON.stringify(state)));
