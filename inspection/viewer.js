"use strict";

// Names ------------------------------------------------------------------------------------------------------------

const file = JSON.parse(document.getElementById("about").textContent);
const { models, pictures } = file;
const find = (selector) => document.querySelector(selector);
const count = (n) => Array.from({ length: n }, (_, i) => i);

// Tokens have keys: "cls", "dist", "reg0", ..., and "patch3-5" is the patch in column 3, row 5.
for (const model of models) {
  model.tokens = [  // with the blocks that they enter and leave at
    ["cls", "Class token", model.cls_pos, model.depth],
    ["dist", "Distillation token", model.dist_pos, model.depth],
    ["pool", "Attention pooling", model.pool_pos ?? null, model.pool_pos + 1],  // a block of its own
    ...model.registers.map(([enters, leaves], r) => [`reg${r}`, `Register ${r}`, enters, leaves]),
  ].filter(([, , enters]) => enters !== null).map(([key, name, enters, leaves]) => ({ key, name, enters, leaves }));
}
// Those of all models; of two with the same key, the second stands for both in the names only.
const TOKENS = [...new Map(models.flatMap(({ tokens }) => tokens.map((token) => [token.key, token]))).values()];

// One scale for models with other numbers of patches would leave the one with more of them black.
const comparable = models.length > 1
  && pictures.every(({ views }) => views.every(({ grid }) => String(grid) === String(views[0].grid)));
const SCALES = [["map", "this map"], ...(comparable ? [["models", "this map of all models"]] : []),
  ["heads", "all heads of this block"], ["blocks", "all blocks"]];
const TOPS = [[99, "99th percentile"], [100, "largest"]];
const CURVES = [["linear", "linear"], ["log", "logarithmic"]];
const DECADES = 3;  // of a logarithmic scale

const KINDS = [["attention", "attention"],
  ...(pictures.some(({ views }) => views.some((v) => Object.keys(v.rollout).length)) ? [["rollout", "rollout"]] : []),
  ...Object.keys(pictures[0].views[0].classes).map((name, i) => [`class${i}`, name])];
const isClass = (kind) => kind.startsWith("class");
const classOf = (view) => Object.entries(view.classes)[+state.map.slice(5)] ?? [];  // name, values

const isPatch = (token) => token !== null && token.startsWith("patch");
const patchKey = ({ grid }, patch) => `patch${patch % grid[1]}-${Math.floor(patch / grid[1])}`;

function patchOf({ grid }, token) {  // its number in the grid, row by row; null: no patch, or outside
  const [, x, y] = /^patch(\d+)-(\d+)$/.exec(token ?? "") ?? [];
  return x === undefined || +x >= grid[1] || +y >= grid[0] ? null : y * grid[1] + +x;
}

// The state names patches of the finest grid; a model with another grid shows its patch at the same place.
const finest = (picture) => picture.views.reduce((a, b) => (b.grid[0] * b.grid[1] > a.grid[0] * a.grid[1] ? b : a));

function moved(token, from, to) {
  const patch = patchOf(from, token);
  if (patch === null || String(from.grid) === String(to.grid)) return token;
  const at = (n, i) => Math.floor((n + 0.5) / from.grid[i] * to.grid[i]);
  return `patch${at(patch % from.grid[1], 1)}-${at(Math.floor(patch / from.grid[1]), 0)}`;
}

function nameOf(token, inside = false) {
  if (isPatch(token)) return `${inside ? "patch" : "Patch"} ${token.slice(5).replace("-", ",")}`;
  const name = TOKENS.find(({ key }) => key === token).name;
  return inside ? name.toLowerCase() : name;
}

function percent(share, maxError = 0) {  // with "± error" if that is visible
  const value = 100 * share, error = 100 * maxError;
  const words = value === 0 ? "0" : value < 1e-4 ? "< 0.0001" : value.toPrecision(3);
  return words + (error > 0.004 * value && error > 1e-4 ? ` ± ${+error.toPrecision(1)}` : "") + " %";
}

// Attention --------------------------------------------------------------------------------------------------------

// The attention of one image at one block, unpacked; `_encode_block` in inspection/html.py describes the packing.
// A place is the index of a token in the sequence [CLS | distillation | patches | registers], or [pooling | patches].
class Attention {
  constructor(bytes, about, patches) {
    const { tokens: n, heads } = about, others = n - patches;
    Object.assign(this, { n, patches, heads: count(heads), first: about.first, places: about.places,
      queries: about.queries, columns: 1 + others });
    this.scales = new Float32Array(bytes, 0, heads * n);
    this.shares = new Float32Array(bytes, 4 * heads * n, heads * n * this.columns);
    this.levels = new Uint8Array(bytes, 4 * heads * n * (1 + this.columns));
  }

  placeOf(view, token) {  // undefined: not in the sequence yet
    return isPatch(token) ? this.first + patchOf(view, token) : this.places[token];
  }

  one(head, from, to) {
    const row = head * this.n + from, patch = to - this.first;
    if (patch >= 0 && patch < this.patches) return this.levels[row * this.patches + patch] * this.scales[row];
    return this.shares[row * this.columns + 1 + (patch < 0 ? to : to - this.patches)];
  }

  over(head, value) {
    return head === "mean" ? this.heads.reduce((sum, h) => sum + value(h), 0) / this.heads.length : value(head);
  }

  share(head, from, to) { return this.over(head, (h) => this.one(h, from, to)); }
  onPatches(head, from) { return this.over(head, (h) => this.shares[(h * this.n + from) * this.columns]); }
  // The largest rounding error of a share on a patch.
  roundingError(head, from) { return this.over(head, (h) => this.scales[h * this.n + from] / 2); }

  map(head, place, direction) {  // a share for each patch, row by row
    const at = (p) => direction === "out" ? this.share(head, place, this.first + p)
      : this.share(head, this.first + p, place);
    return Float64Array.from({ length: this.patches }, (_, p) => at(p));
  }
}

const unpacked = new Map();  // promises, so that no block is unpacked twice
const ENOUGH = 2 ** 28;  // bytes: with more than that unpacked, the next image clears the cache
let held = 0;

function attentionOf(kind, m, image, block) {
  const id = `${kind}-${m}-${image}-${block}`, view = pictures[image].views[m];
  if (!unpacked.has(id)) unpacked.set(id, unpack(id).then((bytes) =>
    new Attention(bytes, view[kind][block], view.grid[0] * view.grid[1])));
  return unpacked.get(id);
}

async function unpack(id) {
  const text = atob(document.getElementById(id).textContent), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  held += bytes.byteLength;
  return bytes;
}

// State ------------------------------------------------------------------------------------------------------------

const DEFAULTS = { map: "attention", head: "mean", scale: comparable ? "models" : "map", top: 99, curve: "linear",
  opacity: 0.6 };
const state = { image: 0, block: 0, token: null, ...DEFAULTS };
let lastToken = null;  // to return to when a patch is released
let pointed = null;  // key of the patch under the pointer, in the finest grid: shown while it is there
let cursor = null;  // key of the patch whose values are read
let drawn = [];  // for each model { out, in }: the maps on the page

const blocksOf = (view) => Object.keys(view.attention).map(Number).sort((a, b) => a - b);
const allBlocks = (picture) => [...new Set(picture.views.flatMap(blocksOf))].sort((a, b) => a - b);
const mostHeads = (picture) => Math.max(...picture.views.map(({ heads }) => heads));

// Change any part of the state; the promise resolves when the page is drawn.
function show(change) {
  const next = { ...state, ...change }, picture = pictures[next.image];
  const must = (fine, words) => { if (!fine) throw new Error(words); };
  must(picture, `there is no image ${next.image}`);
  const there = allBlocks(picture);
  if (change.block === undefined && !there.includes(next.block)) next.block = there.at(-1);
  must(there.includes(next.block), `block ${next.block} is not in this file`);
  must(next.head === "mean" || count(mostHeads(picture)).includes(next.head), `there is no head ${next.head}`);
  for (const [name, choices] of [["map", KINDS], ["scale", SCALES], ["top", TOPS], ["curve", CURVES]])
    must(choices.some(([key]) => key === next[name]), `there is no ${name} ${next[name]}`);
  must(next.opacity >= 0 && next.opacity <= 1, `opacity is 0 to 1, not ${next.opacity}`);
  const inGrid = (token) => patchOf(finest(picture), token) !== null;
  const known = (token) => token === null || TOKENS.some(({ key }) => key === token) || inGrid(token);
  if (change.token === undefined && !known(next.token)) next.token = lastToken;  // a patch outside this grid
  must(known(next.token), `there is no token ${next.token}`);
  if (next.image !== state.image) {
    pointed = cursor = null;
    if (held > ENOUGH) { unpacked.clear(); held = 0; }
  }
  if (!isPatch(next.token)) lastToken = next.token;
  Object.assign(state, next);
  const address = { image: state.image, block: state.block, ...(state.token && { token: state.token }) };
  for (const [key, value] of Object.entries(DEFAULTS)) if (state[key] !== value) address[key] = state[key];
  history.replaceState(null, "", `#${new URLSearchParams(address)}`);
  find("#problem").hidden = true;
  return draw();
}

const release = () => { pointed = null; return show({ token: lastToken }); };

function linked() {  // the state in the address, "#image=2&block=8&token=reg1"
  const value = (key, text) => (key in state && text.trim() !== "" && !Number.isNaN(+text) ? +text : text);
  const asked = [...new URLSearchParams(location.hash.slice(1))].filter(([key]) => key in state);
  return Object.fromEntries(asked.map(([key, text]) => [key, value(key, text)]));
}

function showLinked(change) {
  try { return show(change); } catch (error) {
    const shown = show({ ...start });
    find("#problem").hidden = false;
    find("#problem").textContent = `The link cannot be followed: ${error.message}. This is the first view instead.`;
    return shown;
  }
}

// Colours ----------------------------------------------------------------------------------------------------------

const colours = Uint8Array.from(file.colours.match(/../g), (byte) => parseInt(byte, 16));  // 256 x red, green, blue
const largest = (values) => values.reduce((a, b) => Math.max(a, b), 0);

// What the ends of the scale stand for: the percentile `state.top` of all values of `maps`, those of `scope`.
function rangeOf(maps, scope) {
  const sorted = Float64Array.from(maps.flatMap((map) => Array.from(map))).sort(), most = sorted.at(-1);
  const at = state.top / 100 * (sorted.length - 1), below = Math.floor(at), above = Math.ceil(at);
  const exact = sorted[below] + (at - below) * (sorted[above] - sorted[below]);
  const top = exact > 0 ? exact : most;  // where less than 1 % of the patches has any
  const words = top < most ? `${state.top}th percentile of ${scope}, largest ${percent(most)}` : `largest of ${scope}`;
  return { low: state.curve === "log" ? top / 10 ** DECADES : 0, top, words };
}

function level(value, { low, top }) {  // 0..1
  const share = low === 0 ? value / top : 1 + Math.log10(value / top) / DECADES;
  return top > 0 ? Math.max(0, Math.min(1, share)) : 0;
}

// Red, green, blue (0..255) and alpha (0..1), which grows with the value: little attention lets the photo through.
function shade(value, range, opacity) {
  const share = level(value, range), i = 3 * Math.min(255, Math.floor(256 * share));
  return [...colours.subarray(i, i + 3), opacity === 0 ? 0 : share ** (1 / opacity - 1)];
}

function paint(canvas, values, width, range, opacity) {
  const height = values.length / width, pixels = new ImageData(width, height);
  values.forEach((value, i) => {
    const [r, g, b, alpha] = shade(value, range, opacity);
    pixels.data.set([r, g, b, Math.round(255 * alpha)], 4 * i);
  });
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

const paintBar = (canvas, opacity) => paint(canvas, count(256), 256, { low: 0, top: 255 }, opacity);

const greys = new Map();  // src -> promise of the photo in grey, without black and white, as the ground of maps

function greyOf(src) {
  if (!greys.has(src)) greys.set(src, (async () => {
    const photo = Object.assign(new Image(), { src }), canvas = document.createElement("canvas");
    await photo.decode();
    const { naturalWidth: width, naturalHeight: height } = photo;
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.drawImage(photo, 0, 0);
    const pixels = context.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [r, g, b] = pixels.data.subarray(i, i + 3);
      pixels.data.fill(35 + 0.7 * (0.299 * r + 0.587 * g + 0.114 * b), i, i + 3);
    }
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL(height > 64 ? "image/jpeg" : "image/png");
  })());
  return greys.get(src);
}
