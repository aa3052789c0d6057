// A bundle in JavaScript: its proof, its preprocessing and its token maps, for browsers and Node alike.

/** Tensors of a safetensors file: name -> {shape, data}. */
export function readSafetensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const kinds = { F32: Float32Array, I32: Int32Array, I64: BigInt64Array, U8: Uint8Array };
  const tensors = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [start, stop] = entry.data_offsets;
    if (!kinds[entry.dtype]) throw new Error(`the proof has a tensor of type ${entry.dtype}`);
    tensors[name] = { shape: entry.shape, data: new kinds[entry.dtype](buffer.slice(8 + size + start, 8 + size + stop)) };
  }
  return tensors;
}

const FILTERS = {
  box: [(x) => (x > -0.5 && x <= 0.5 ? 1 : 0), 0.5],
  bilinear: [(x) => Math.max(0, 1 - Math.abs(x)), 1],
  hamming: [(x) => hamming(Math.abs(x)), 1],
  bicubic: [(x) => cubic(Math.abs(x)), 2],
  lanczos: [(x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0), 3],
};
const BITS = 22; // of a weight's fraction, as in Pillow

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function hamming(x) {
  if (x === 0) return 1;
  return x >= 1 ? 0 : (Math.sin(x * Math.PI) / (x * Math.PI)) * (0.54 + 0.46 * Math.cos(x * Math.PI));
}

function cubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

// For every output pixel the input pixels it is made of: the filter widens where the image gets smaller.
function tapsOf(nIn, nOut, [weight, support]) {
  const scale = nIn / nOut, stretch = Math.max(scale, 1), reach = support * stretch;
  return Array.from({ length: nOut }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - reach + 0.5), 0), last = Math.min(Math.trunc(center + reach + 0.5), nIn);
    const weights = [];
    for (let x = first; x < last; x++) weights.push(weight((x - center + 0.5) * (1 / stretch))); // as Pillow rounds: / stretch is another number
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((w) => Math.trunc((sum ? w / sum : w) * 2 ** BITS + (w < 0 ? -0.5 : 0.5))) };
  });
}

const rounded = (sum) => Math.min(Math.max(Math.floor(sum / 2 ** BITS), 0), 255);

function across(image, width, filter) {
  const { height, channels: c, pixels } = image, out = new Uint8Array(height * width * c);
  const taps = tapsOf(image.width, width, filter);
  for (let y = 0, place = 0; y < height; y++)
    for (const { first, weights } of taps)
      for (let k = 0; k < c; k++) {
        let sum = 2 ** (BITS - 1), at = (y * image.width + first) * c + k;
        for (const w of weights) (sum += pixels[at] * w), (at += c);
        out[place++] = rounded(sum);
      }
  return { height, width, channels: c, pixels: out };
}

function transposed(image) {
  const { height, width, channels: c, pixels } = image, out = new Uint8Array(pixels.length);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) for (let k = 0; k < c; k++) out[(x * height + y) * c + k] = pixels[(y * width + x) * c + k];
  return { height: width, width: height, channels: c, pixels: out };
}

function nearest(image, height, width) {
  const { channels: c, pixels } = image, out = new Uint8Array(height * width * c);
  const at = (n, step) => Array.from({ length: n }, ((x) => () => (x += step) - step)(step * 0.5));
  const rows = at(height, image.height / height), columns = at(width, image.width / width);
  let place = 0;
  for (const y of rows)
    for (const x of columns) {
      const from = (Math.min(Math.trunc(y), image.height - 1) * image.width + Math.min(Math.trunc(x), image.width - 1)) * c;
      for (let k = 0; k < c; k++) out[place++] = pixels[from + k];
    }
  return { height, width, channels: c, pixels: out };
}

/** An image as Pillow resizes it. image: {height, width, channels, pixels (bytes, row by row)}. */
export function resize(image, height, width, name) {
  if (name === "nearest") return nearest(image, height, width);
  if (!FILTERS[name]) throw new Error(`interpolation ${name} is none of Pillow's`);
  // The pass between is rounded to 8 bits, so the order of the two shows: the rule of engines/cpp/src/prepare.cpp.
  const rowsFirst = height < image.height && image.height - height > 2 * (image.width - width);
  const wide = (x) => (x.width === width ? x : across(x, width, FILTERS[name]));
  const high = (x) => (x.height === height ? x : transposed(across(transposed(x), height, FILTERS[name])));
  return rowsFirst ? wide(high(image)) : high(wide(image));
}

const toEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // as Python rounds

/** An image resized and cropped to the input's size. */
export function fit(image, p) {
  const [height, width] = p.size, scaled = p.size.map((n) => Math.floor(n / p.crop));
  let target;
  if (p.crop_mode === "squash") target = scaled;
  else if (p.crop_mode !== "border" && scaled[0] === scaled[1]) {
    const [short, long] = [image.width, image.height].sort((a, b) => a - b);
    const other = Math.trunc((scaled[0] * long) / short);
    target = image.height <= image.width ? [scaled[0], other] : [other, scaled[0]];
  } else {
    const ratios = [image.height / scaled[0], image.width / scaled[1]];
    const ratio = p.crop_mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
    target = [toEven(image.height / ratio), toEven(image.width / ratio)];
  }
  if (target[0] !== image.height || target[1] !== image.width)
    image = resize(image, Math.max(target[0], 1), Math.max(target[1], 1), p.interpolation);
  const fill = p.mean.map((m) => (p.crop_mode === "border" ? toEven(255 * m) : 0));
  const field = [Math.max(image.height, height), Math.max(image.width, width)];
  const from = [toEven((field[0] - height) / 2), toEven((field[1] - width) / 2)];
  const pad = [Math.floor((field[0] - image.height) / 2), Math.floor((field[1] - image.width) / 2)];
  const c = image.channels, out = new Uint8Array(height * width * c);
  for (let y = 0, place = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const row = y + from[0] - pad[0], column = x + from[1] - pad[1];
      const inside = row >= 0 && row < image.height && column >= 0 && column < image.width;
      for (let k = 0; k < c; k++) out[place++] = inside ? image.pixels[(row * image.width + column) * c + k] : fill[k];
    }
  return { height, width, channels: c, pixels: out };
}

/** A photo as the file takes it, without the batch axis. */
export function toInput(image, p) {
  const { pixels, channels: c } = fit(image, p), n = p.size[0] * p.size[1];
  if (!p.normalised && p.layout === "nhwc") return pixels;
  const out = p.normalised ? new Float32Array(n * c) : new Uint8Array(n * c);
  for (let i = 0; i < n; i++)
    for (let k = 0; k < c; k++) {
      const value = pixels[i * c + k];
      out[k * n + i] = p.normalised ? Math.fround(Math.fround(value / 255) - Math.fround(p.mean[k])) / Math.fround(p.std[k]) : value;
    }
  return out;
}

/** What becomes of the rows of one step: {keep, host}. host: the row itself, its host, n_in where it is fused, -1 dropped. */
export function readFates(values, step, image) {
  const parts = {};
  for (const [part, name] of Object.entries(step.parts)) {
    const { dims, data } = values[name], n = data.length / dims[0];
    parts[part] = Array.from(data.slice(image * n, (image + 1) * n), Number);
  }
  const order = parts.order ?? [...(parts.keep ?? []), ...(parts.src ?? [])];
  if (order.length !== step.n_kept + step.n_folded || new Set(order).size !== order.length || order.some((r) => !(r >= 0 && r < step.n_in)))
    throw new Error(`block ${step.block}: the decisions of the file are none`);
  const keep = order.slice(0, step.n_kept), src = order.slice(step.n_kept), host = Array(step.n_in).fill(-1);
  for (const row of keep) host[row] = row;
  src.forEach((row, i) => {
    if (step.n_out > step.n_kept) return void (host[row] = step.n_in);
    const at = step.row_labels.indexOf(parts.dst ? parts.dst[i] : parts.target[row]);
    if (at < 0) throw new Error(`block ${step.block}: a row is folded into one that does not stay`);
    host[row] = keep[at];
  });
  return { keep, host };
}

const fateOf = (host, row, ids, n_in, fused) => (host[row] === n_in ? fused : host[row] < 0 ? -1 : ids[host[row]]);

/** The first difference between two lists of fates, {block, margin, explained}, or null; and whether rows are reordered. */
export function compare(stored, now, margins, manifest) {
  let ids = Array.from({ length: manifest.tokens }, (_, i) => i), idsNow = ids, reordered = false;
  for (const [k, step] of manifest.decisions.entries()) {
    const fused = manifest.tokens + k, a = {}, b = {}, row = {};
    ids.forEach((t, r) => ((a[t] = fateOf(stored[k].host, r, ids, step.n_in, fused)), (row[t] = r)));
    idsNow.forEach((t, r) => (b[t] = fateOf(now[k].host, r, idsNow, step.n_in, fused)));
    const kept = stored[k].keep.map((r) => ids[r]), keptNow = now[k].keep.map((r) => idsNow[r]);
    let differ = ids.filter((t) => a[t] !== b[t]);
    const moved = kept.flatMap((t, i) => (t === keptNow[i] ? [] : [t, keptNow[i]]));
    if (!differ.length && manifest.ordered) differ = moved;
    if (differ.length) {
      const margin = Math.max(...differ.map((t) => marginOf(t, a, b, margins[k], row[t])));
      return { difference: { block: step.block, margin, explained: margin <= step.near_tie }, reordered };
    }
    reordered ||= moved.length > 0;
    const extra = step.n_out > step.n_kept ? [fused] : [];
    (ids = [...kept, ...extra]), (idsNow = [...keptNow, ...extra]);
  }
  return { difference: null, reordered };
}

// What speaks against the other fate of a token; 0 where it only follows from that of its host.
function marginOf(token, a, b, margins, row) {
  const kind = (fate) => (fate === token ? 0 : fate >= 0 ? 1 : fate);
  if (kind(a[token]) !== kind(b[token]) || kind(b[token]) === 0) return margins.fate[row];
  const stay = [a, b].every((side) => [a[token], b[token]].every((h) => side[h] === h));
  return stay ? margins.host[row] : 0;
}

/** patch or token -> the row it is in after each step, -1 when it was dropped: one list a step. */
export function tokenMaps(values, manifest, image) {
  let place = Array.from({ length: manifest.tokens }, (_, i) => i);
  return manifest.decisions.map((step) => {
    const { keep, host } = readFates(values, step, image), at = new Map(keep.map((row, i) => [row, i]));
    place = place.map((row) => (row < 0 || host[row] < 0 ? -1 : host[row] === step.n_in ? step.n_kept : at.get(host[row])));
    return place;
  });
}

/** The bytes of a file that also gives its decisions: a protobuf message that is added at the end is merged. */
export function withDecisions(file, extra) {
  const out = new Uint8Array(file.byteLength + extra.byteLength);
  out.set(new Uint8Array(file));
  out.set(new Uint8Array(extra), file.byteLength);
  return out;
}

/** Does this runtime compute what PyTorch computed? ort: the module; session: opened withDecisions. */
export async function prove(ort, session, manifest, tensors) {
  const input = manifest.inputs[0], n = manifest.proof.images, size = tensors.input.data.length / n, faults = [];
  const batch = input.shape[0] ?? 1, images = [];
  for (let i = 0; i < n; i++) {
    const one = tensors.input.data.slice(i * size, (i + 1) * size), full = new one.constructor(batch * size);
    for (let k = 0; k < batch; k++) full.set(one, k * size);
    const values = await session.run({ [input.name]: new ort.Tensor(input.type, full, [batch, ...tensors.input.shape.slice(1)]) });
    images.push(judge(manifest, tensors, batched(values, batch), i));
  }
  for (const [i, image] of images.entries()) if (image.verdict === "failed") faults.push(`image ${i}: ${image.why}`);
  const judged = images.filter((image) => image.verdict === "equal").length;
  if (!judged && !faults.length) faults.push("no image could be judged to its end");
  return { passed: !faults.length, judged, images, faults };
}

// Decisions of a file for one image have no batch axis.
function batched(values, batch) {
  const out = {};
  for (const [name, { dims, data }] of Object.entries(values)) out[name] = { data, dims: batch === 1 && name.includes(".") && dims[0] !== 1 ? [1, ...dims] : dims };
  return out;
}

function judge(manifest, tensors, values, i) {
  const pixels = manifest.proof.photos ? pixelError(manifest, tensors, i) : 0;
  if (!(pixels <= 1.001)) return { verdict: "failed", why: `the preprocessed photo differs by ${pixels.toFixed(2)} of 255` };
  let compared = { difference: null, reordered: false };
  try {
    if (manifest.decisions.length) compared = compareImage(manifest, tensors, values, i);
  } catch (e) {
    return { verdict: "failed", why: e.message };
  }
  const { difference, reordered } = compared;
  if (difference) {
    const words = `another decision in block ${difference.block}, margin ${difference.margin.toExponential(1)}`;
    return { verdict: difference.explained ? "flipped" : "failed", why: words };
  }
  const errors = {};
  for (const output of manifest.outputs) {
    if (output.by_row && reordered) continue;
    const [error, own] = ["reference", "own"].map((side) => errorOf(values[output.name], tensors[`${side}.${output.name}`], tensors[`scale.${output.name}`].data[i], output.exact, i));
    errors[output.name] = Math.max(error, own);
    if (!(error <= output.limit && own <= output.own_limit))
      return { verdict: "failed", errors, why: `${output.name} is off by ${error.toExponential(1)} (at most ${output.limit}), from its own by ${own.toExponential(1)}` };
  }
  return { verdict: "equal", errors };
}

function compareImage(manifest, tensors, values, i) {
  const row = (name, n, from = i) => Array.from(tensors[name].data.slice(from * n, (from + 1) * n));
  const stored = manifest.decisions.map((s) => ({ keep: row(`keep.block${s.block}`, s.n_kept), host: row(`host.block${s.block}`, s.n_in) }));
  const margins = manifest.decisions.map((s) => ({
    fate: row(`margin.block${s.block}`, s.n_in),
    host: row(`margin.block${s.block}`, s.n_in, manifest.proof.images + i),
  }));
  const now = manifest.decisions.map((s) => readFates(values, s, 0));
  return compare(stored, now, margins, manifest);
}

function errorOf(value, wanted, scale, exact, i) {
  const n = wanted.data.length / wanted.shape[0];
  let worst = 0;
  for (let k = 0; k < n; k++) {
    const a = Number(value.data[k]), b = Number(wanted.data[i * n + k]);
    const error = exact ? Number(a !== b) / n : Math.abs(a - b) / Math.max(scale, 1e-30);
    if (!Number.isFinite(error)) return Infinity;
    worst = exact ? worst + error : Math.max(worst, error);
  }
  return worst;
}

function pixelError(manifest, tensors, i) {
  const p = manifest.preprocessing, photo = tensors[`photo.${i}`], [height, width, channels] = photo.shape;
  const value = toInput({ height, width, channels, pixels: photo.data }, p), n = p.size[0] * p.size[1];
  let worst = 0;
  for (let k = 0; k < value.length; k++) {
    const unit = p.normalised ? 255 * p.std[Math.floor(k / n)] : 1;
    worst = Math.max(worst, Math.abs(value[k] - tensors.input.data[i * value.length + k]) * unit);
  }
  return worst;
}
