// Sections of the anomalous difference map around a site, ours beside the reference's.
import { blueRed, digits, element, json, say } from "./common.js";

const place = document.getElementById("maps");
const form = document.getElementById("controls");
const LEVELS = [3, 5, 8, 12, 16, 20];
const SIZE = 320;
const AXES = ["x", "y", "z"];
const sections = [];
let data = null;

const point = () => AXES.map((axis) => Number(form.elements[axis].value));

// Values on the section across an axis: value(i, j), i along the first axis that is left.
function section(cube, n, across, at) {
  const [a, b] = [0, 1, 2].filter((k) => k !== across);
  const stride = [n * n, n, 1];
  return (i, j) => cube[i * stride[a] + j * stride[b] + at * stride[across]];
}

function contour(c, value, n, level, unit) {
  const cut = (p, q) => (level - p) / (q - p);
  for (let i = 0; i + 1 < n; i++) {
    for (let j = 0; j + 1 < n; j++) {
      const [p, q, r, s] = [value(i, j), value(i + 1, j), value(i + 1, j + 1), value(i, j + 1)];
      const ends = [];
      if ((p > level) !== (q > level)) ends.push([i + cut(p, q), j]);
      if ((q > level) !== (r > level)) ends.push([i + 1, j + cut(q, r)]);
      if ((r > level) !== (s > level)) ends.push([i + 1 - cut(r, s), j + 1]);
      if ((s > level) !== (p > level)) ends.push([i, j + 1 - cut(s, p)]);
      for (let k = 0; k + 1 < ends.length; k += 2) {
        c.moveTo((ends[k][0] + 0.5) * unit, SIZE - (ends[k][1] + 0.5) * unit);
        c.lineTo((ends[k + 1][0] + 0.5) * unit, SIZE - (ends[k + 1][1] + 0.5) * unit);
      }
    }
  }
}

function draw({ canvas, cube, across, limit }) {
  const n = data.points, half = (n - 1) / 2, unit = SIZE / n;
  const at = point(), [a, b] = [0, 1, 2].filter((k) => k !== across);
  const value = section(cube, n, across, at[across] + half);
  const c = canvas.getContext("2d");
  const small = document.createElement("canvas");
  small.width = small.height = n;
  const image = new ImageData(n, n);
  for (let j = 0; j < n; j++) {
    for (let i = 0; i < n; i++) image.data.set([...blueRed(value(i, j) / limit), 255], 4 * ((n - 1 - j) * n + i));
  }
  small.getContext("2d").putImageData(image, 0, 0);
  c.setLineDash([]);
  c.imageSmoothingEnabled = true;
  c.drawImage(small, 0, 0, SIZE, SIZE);
  for (const sign of [1, -1]) {
    c.beginPath();
    c.setLineDash(sign > 0 ? [] : [4, 3]);
    c.lineWidth = 1;
    c.strokeStyle = "rgba(20, 28, 40, .8)";
    for (const level of LEVELS) contour(c, value, n, sign * level, unit);
    c.stroke();
  }
  c.setLineDash([]);
  c.strokeStyle = "rgba(0, 110, 70, .9)";
  c.beginPath();
  const [x, y] = [(at[a] + half + 0.5) * unit, SIZE - (at[b] + half + 0.5) * unit];
  c.moveTo(x, 0); c.lineTo(x, SIZE); c.moveTo(0, y); c.lineTo(SIZE, y);
  c.globalAlpha = 0.35; c.stroke(); c.globalAlpha = 1;
  if (!form.elements.atoms.checked) return;
  c.font = "11px system-ui, sans-serif";
  for (const atom of data.atoms) {
    if (Math.abs(atom.xyz[across] - at[across] * data.step) > 1) continue;
    const [ax, ay] = [(atom.xyz[a] / data.step + half + 0.5) * unit, SIZE - (atom.xyz[b] / data.step + half + 0.5) * unit];
    c.beginPath();
    c.arc(ax, ay, 2.6, 0, 7);
    c.fillStyle = { O: "#c0392b", N: "#2255bb", S: "#b58900", I: "#7d3c98" }[atom.element] ?? "#333";
    c.fill();
    if (!["C", "O", "N"].includes(atom.element) || atom.name.endsWith(" CA")) c.fillText(atom.name, ax + 4, ay - 3);
  }
}

function redraw() {
  AXES.forEach((axis) => {
    const input = form.elements[axis];
    input.nextElementSibling.textContent = `${(input.value * data.step).toFixed(1)} Å`;
  });
  sections.forEach(draw);
}

function addMap(found) {
  if (found.reason) {
    place.append(element("h2", {}, found.name), element("p", { class: "note" }, found.reason));
    return;
  }
  const title = `${found.name}: ${digits(found.height)} sigma (${found.pairs} Bijvoet pairs to ${digits(found.d_min)} Å)`;
  const row = element("div", { class: "sections" });
  const limit = Math.max(5, 0.6 * Math.max(...found.cube));
  for (const across of [2, 1, 0]) {
    const [a, b] = [0, 1, 2].filter((k) => k !== across);
    const canvas = element("canvas", { width: SIZE, height: SIZE, "aria-label": `section across ${AXES[across]}` });
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect(), half = (data.points - 1) / 2;
      const cell = (v) => Math.max(-half, Math.min(half, Math.floor(v * data.points) - half));
      form.elements[AXES[a]].value = cell((event.clientX - box.left) / box.width);
      form.elements[AXES[b]].value = cell(1 - (event.clientY - box.top) / box.height);
      redraw();
    });
    row.append(element("figure", {}, canvas, element("figcaption", {}, `${AXES[a]} to the right, ${AXES[b]} upwards`)));
    sections.push({ canvas, cube: found.cube, across, limit });
  }
  place.append(element("h2", {}, title), row);
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => data && redraw());
json(`/map/${place.dataset.site}/data?set=${place.dataset.set}`).then((found) => {
  data = found;
  found.maps.forEach(addMap);
  redraw();
}).catch((error) => say(error.message)).finally(() => place.setAttribute("aria-busy", "false"));
