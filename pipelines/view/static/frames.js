// A detector frame on a canvas, with boxes, masks and resolution rings over it.
import { answer, json, say } from "./common.js";

const canvas = document.getElementById("frame");
const form = document.getElementById("controls").elements;
const readout = document.getElementById("readout");
const { sweep, panel, first, mark } = canvas.dataset;
const NO_COUNT = 65535;
const state = { scale: 0, x: 0, y: 0, counts: null, boxes: null, mask: null, geometry: null, request: 0 };
const picture = document.createElement("canvas");
const overlay = document.createElement("canvas");

const black = () => Math.max(1, Math.round(2 ** (form.top.value / 7)));

async function array(address, kind) {
  const response = await answer(address);
  const shape = response.headers.get("x-shape").split(",").map(Number);
  return { values: new kind(await response.arrayBuffer()), height: shape[0], width: shape[1] };
}

async function load() {
  const request = ++state.request;
  const image = Number(form.image.value);
  const base = `/frames/${sweep}/${image - first}/${panel}`;
  canvas.setAttribute("aria-busy", "true");
  say("");
  const part = (promise) => promise.catch((error) => { say(error.message); return null; });
  const [counts, boxes, mask] = await Promise.all([
    part(array(`${base}/counts`, Uint16Array)),
    part(json(`${base}/boxes`)),
    form.mask.checked ? part(array(`${base}/mask`, Uint8Array)) : null,
  ]);
  if (request !== state.request) return; // a later image was asked for meanwhile
  Object.assign(state, { counts, boxes, mask });
  const address = new URL(location.href);
  address.searchParams.set("image", image);
  history.replaceState(null, "", address);
  paint();
  canvas.setAttribute("aria-busy", "false");
}

// Counts to grey: white for none, black at the chosen count, on a square-root scale.
function paint() {
  document.getElementById("black").textContent = black();
  const { counts, mask } = state;
  const size = counts ?? mask;
  if (size) {
    picture.width = overlay.width = size.width;
    picture.height = overlay.height = size.height;
  }
  if (counts) {
    const image = new ImageData(counts.width, counts.height);
    const pixels = new Uint32Array(image.data.buffer);
    const grey = new Uint32Array(NO_COUNT + 1);
    const top = Math.sqrt(black());
    for (let n = 0; n < NO_COUNT; n++) {
      const g = Math.round(255 * (1 - Math.min(1, Math.sqrt(n) / top)));
      grey[n] = 0xff000000 | (g << 16) | (g << 8) | g;
    }
    grey[NO_COUNT] = 0xffb49a8c; // where there is no count
    for (let i = 0; i < pixels.length; i++) pixels[i] = grey[counts.values[i]];
    picture.getContext("2d").putImageData(image, 0, 0);
  }
  if (mask) {
    const image = new ImageData(mask.width, mask.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < pixels.length; i++) {
      const bits = mask.values[i];
      if (bits & 4) pixels[i] = 0xb01f43d8;
      else if (bits & 1) pixels[i] = 0x60c97317;
      else if (bits & 2) pixels[i] = 0x80009fe6; // left to a spot that is not integrated
    }
    overlay.getContext("2d").putImageData(image, 0, 0);
  }
  draw();
}

function fit() {
  const height = state.counts?.height ?? 1, width = state.counts?.width ?? 1;
  state.scale = Math.min(canvas.width / width, canvas.height / height);
  state.x = (width - canvas.width / state.scale) / 2;
  state.y = (height - canvas.height / state.scale) / 2;
}

function draw() {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
    state.scale = 0;
  }
  if (!state.scale && state.counts) {
    fit();
    if (mark) seek();
  }
  const c = canvas.getContext("2d");
  c.setTransform(1, 0, 0, 1, 0, 0);
  c.fillStyle = "#8c9ab4";
  c.fillRect(0, 0, width, height);
  const s = state.scale;
  c.setTransform(s, 0, 0, s, -state.x * s, -state.y * s);
  c.imageSmoothingEnabled = s < 1;
  if (state.counts) c.drawImage(picture, 0, 0);
  if (state.mask && form.mask.checked) c.drawImage(overlay, 0, 0);
  if (state.boxes && form.boxes.checked) drawBoxes(c, ratio / s);
  if (state.geometry && form.rings.checked) drawRings(c, ratio / s);
}

function drawBoxes(c, unit) {
  const { size: [height, width], row, slow, fast, flags } = state.boxes;
  row.forEach((number, i) => {
    const isMarked = String(number) === mark;
    c.lineWidth = (isMarked ? 3 : 1.2) * unit;
    c.strokeStyle = isMarked ? "#00a05a" : flags[i] & 24 ? "#d8431f" : "#1773c9";
    c.strokeRect(fast[i], slow[i], width, height);
  });
}

function drawRings(c, unit) {
  const at = ([x, y]) => [(x - state.x) * state.scale, (y - state.y) * state.scale];
  for (const { d, path } of state.geometry.rings) {
    c.lineWidth = 1.3 * unit;
    c.strokeStyle = "rgba(0, 130, 90, .75)";
    c.beginPath();
    let before = null;
    for (const [x, y] of path) {
      // the plane's far side parts the ring
      if (before && Math.hypot(x - before[0], y - before[1]) < 400) c.lineTo(x, y);
      else c.moveTo(x, y);
      before = [x, y];
    }
    c.stroke();
    const seen = path.filter((p) => {
      const [x, y] = at(p);
      return x > 30 * unit && x < canvas.width - 60 && y > 20 && y < canvas.height - 10
        && p[0] > 0 && p[1] > 0 && p[0] < picture.width && p[1] < picture.height;
    });
    if (!seen.length) continue;
    const [x, y] = seen.reduce((a, b) => (b[1] < a[1] ? b : a));
    c.font = `600 ${12 * unit}px system-ui, sans-serif`;
    c.lineWidth = 3 * unit;
    c.strokeStyle = "rgba(255, 255, 255, .9)";
    c.strokeText(`${d} Å`, x, y - 3 * unit);
    c.fillStyle = "#005f40";
    c.fillText(`${d} Å`, x, y - 3 * unit);
  }
}

// Go near to the reflection that the address names.
function seek() {
  const i = state.boxes ? state.boxes.row.findIndex((r) => String(r) === mark) : -1;
  if (i < 0) return;
  const [height, width] = state.boxes.size;
  zoom(4, state.boxes.fast[i] + width / 2, state.boxes.slow[i] + height / 2, true);
}

function zoom(factor, x, y, isCentre = false) {
  const before = state.scale;
  state.scale = Math.max(0.05, Math.min(60, before * factor));
  if (isCentre) {
    state.x = x - canvas.width / 2 / state.scale;
    state.y = y - canvas.height / 2 / state.scale;
  } else {
    state.x = x - (x - state.x) * (before / state.scale);
    state.y = y - (y - state.y) * (before / state.scale);
  }
}

const middle = () => [state.x + canvas.width / 2 / state.scale, state.y + canvas.height / 2 / state.scale];

function place(event) {
  const ratio = canvas.width / canvas.clientWidth;
  const box = canvas.getBoundingClientRect();
  return [
    state.x + ((event.clientX - box.left) * ratio) / state.scale,
    state.y + ((event.clientY - box.top) * ratio) / state.scale,
  ];
}

function resolution(x, y) {
  const { d_matrix: m, s0, pixel_size: p } = state.geometry;
  const ray = m.map((row) => row[0] * x * p[0] + row[1] * y * p[1] + row[2]);
  const length = Math.hypot(...ray), k = Math.hypot(...s0);
  const r = ray.map((v, i) => (v / length) * k - s0[i]);
  return 1 / Math.hypot(...r);
}

function boxAt(x, y) {
  if (!state.boxes || !form.boxes.checked) return -1;
  const { size: [height, width], fast, slow } = state.boxes;
  let best = -1, nearest = Infinity;
  fast.forEach((left, i) => {
    if (x < left || y < slow[i] || x > left + width || y > slow[i] + height) return;
    const distance = Math.hypot(x - left - width / 2, y - slow[i] - height / 2);
    if (distance < nearest) [best, nearest] = [i, distance];
  });
  return best;
}

function tell(event) {
  const [x, y] = place(event);
  const { counts, boxes } = state;
  if (!counts || x < 0 || y < 0 || x >= counts.width || y >= counts.height) return;
  const n = counts.values[Math.floor(y) * counts.width + Math.floor(x)];
  const words = [`fast ${x.toFixed(1)}, slow ${y.toFixed(1)}`, n === NO_COUNT ? "no count" : `${n} photons`];
  if (state.geometry) words.push(`${resolution(x, y).toFixed(2)} Å`);
  const i = boxAt(x, y);
  if (i >= 0) words.push(`box of ${boxes.hkl[i].join(" ")}, ${boxes.flags[i] & 8 ? "not integrated" : `J / sigma ${boxes.signal[i]}`}`);
  readout.textContent = words.join(" · ");
}

let drag = null;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  drag = { at: place(event), moved: 0, x: event.clientX, y: event.clientY };
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag) return tell(event);
  drag.moved += Math.hypot(event.clientX - drag.x, event.clientY - drag.y);
  [drag.x, drag.y] = [event.clientX, event.clientY];
  const [x, y] = place(event);
  state.x += drag.at[0] - x;
  state.y += drag.at[1] - y;
  draw();
});
canvas.addEventListener("pointerup", (event) => {
  const wasClick = drag && drag.moved < 6;
  drag = null;
  if (!wasClick) return;
  const i = boxAt(...place(event));
  if (i >= 0) location.href = `/reflection/${state.boxes.row[i]}`;
});
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.25 : 0.8, ...place(event));
  draw();
}, { passive: false });

function show(image) {
  const wanted = Math.max(Number(form.image.min), Math.min(Number(form.image.max), image));
  form.image.value = form.slider.value = wanted;
  load();
}
form.slider.addEventListener("input", () => show(Number(form.slider.value)));
form.image.addEventListener("change", () => show(Number(form.image.value)));
document.getElementById("previous").addEventListener("click", () => show(Number(form.image.value) - 1));
document.getElementById("next").addEventListener("click", () => show(Number(form.image.value) + 1));
document.getElementById("in").addEventListener("click", () => { zoom(1.5, ...middle(), true); draw(); });
document.getElementById("out").addEventListener("click", () => { zoom(1 / 1.5, ...middle(), true); draw(); });
document.getElementById("fit").addEventListener("click", () => { fit(); draw(); });
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
  if (step) { event.preventDefault(); show(Number(form.image.value) + step); }
});
for (const name of ["boxes", "rings"]) form[name].addEventListener("change", draw);
form.mask.addEventListener("change", load);
form.top.addEventListener("input", paint);
for (const name of ["sweep", "panel"]) {
  form[name]?.addEventListener("change", () => {
    const address = new URL("/frames", location.href);
    address.searchParams.set("sweep", form.sweep?.value ?? sweep);
    if (name === "panel") {
      address.searchParams.set("panel", form.panel.value);
      address.searchParams.set("image", form.image.value);
    }
    location.href = address;
  });
}
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
new ResizeObserver(draw).observe(canvas);
json(`/frames/${sweep}/${panel}/geometry`).then((found) => { state.geometry = found; draw(); })
  .catch((error) => say(error.message));
load();
