// One reflection: its box through the frames, the likelihood of J, its symmetry mates.
import { blueRed, digits, element, json, plot, say, short, svg } from "./common.js";

const place = document.getElementById("reflection");
const wide = () => Math.max(300, Math.min(760, place.clientWidth));

function voxels(values, valid, colour) {
  const height = values.length, width = values[0].length;
  const canvas = element("canvas", { class: "voxels", width, height });
  const zoom = Math.max(5, Math.min(10, Math.floor(110 / width)));
  canvas.style.width = `${width * zoom}px`;
  canvas.style.height = `${height * zoom}px`;
  const c = canvas.getContext("2d"), image = c.createImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let rgb = colour(values[y][x]);
      if (!valid[y][x]) rgb = (x + y) % 2 ? [150, 160, 175] : [185, 193, 205];
      image.data.set([...rgb, 255], 4 * (y * width + x));
    }
  }
  c.putImageData(image, 0, 0);
  return canvas;
}

function drawBox(found) {
  const { counts, model, valid, corner, frames_per_layer: deep } = found.box;
  const top = Math.max(1, ...counts.flat(2), ...model.flat(2));
  const grey = (n) => { const g = Math.round(255 * (1 - Math.sqrt(Math.max(n, 0) / top))); return [g, g, g]; };
  const first = found.first_image + corner[0];
  const head = element("tr", {}, element("th"));
  counts.forEach((_, k) => head.append(element("th", {}, deep > 1 ? `${first + k * deep}–${first + (k + 1) * deep - 1}` : `${first + k}`)));
  const body = element("tbody");
  const line = (name, images, colour) => {
    const row = element("tr", {}, element("th", {}, name));
    images.forEach((image, k) => {
      const sum = image.flat().reduce((a, b, i) => a + (valid[k].flat()[i] ? b : 0), 0);
      const canvas = voxels(image, valid[k], colour);
      canvas.title = name === "residual" ? name : `${name}: ${short(sum)} photons in the layer`;
      row.append(element("td", {}, canvas));
    });
    body.append(row);
  };
  const residual = counts.map((layer, k) => layer.map((row, y) => row.map((n, x) =>
    (n - model[k][y][x]) / Math.sqrt(Math.max(model[k][y][x], 1e-3)))));
  line("counts", counts, grey);
  line("model", model, grey);
  line("residual", residual, (r) => blueRed(r / 4));
  document.getElementById("box").append(element("table", { class: "strip" }, element("thead", {}, head), body));
}

function drawCurve(found) {
  if (!found.likelihood) {
    document.getElementById("values").textContent = "Too little of the spot was recorded to be used: it is not integrated.";
    return;
  }
  const { J, density, mode, sigma, expected } = found.likelihood;
  let [low, high] = [J[0], J[J.length - 1]];
  if (expected !== null) [low, high] = [Math.min(low, expected), Math.max(high, expected)];
  const most = Math.max(...density);
  const p = plot(wide(), 260, [low, high], [0, 1.18 * most], "J [photons]", "density of J, flat prior");
  const path = J.map((j, i) => `${i ? "L" : "M"}${p.x(j).toFixed(1)} ${p.y(density[i]).toFixed(1)}`).join("");
  p.root.append(svg("path", { class: "area", d: `${path}L${p.x(J[J.length - 1])} ${p.y(0)}L${p.x(J[0])} ${p.y(0)}Z` }));
  p.root.append(svg("path", { class: "ours", d: path }));
  const names = [["ours", "photons alone"]];
  if (expected !== null) {
    p.root.append(svg("line", { class: "merge", x1: p.x(expected), x2: p.x(expected), y1: p.top, y2: p.bottom }));
    names.push(["merge", "expected by the merge"]);
  }
  const { dials } = found, theirs = dials.prf ?? dials.sum;
  if (theirs) {
    const y = p.y(0.5 * most), at = Math.max(low, Math.min(high, theirs.value));
    const from = Math.max(low, theirs.value - theirs.sigma), to = Math.min(high, theirs.value + theirs.sigma);
    p.root.append(svg("line", { class: "theirs", x1: p.x(from), x2: p.x(to), y1: y, y2: y }));
    p.root.append(svg("circle", { class: "theirs", cx: p.x(at), cy: y, r: 4 }));
    names.push(["theirs", "DIALS"]);
  }
  names.forEach(([kind, name], i) => p.root.append(svg("text", { class: kind, x: p.right - 4, y: p.top + 14 + 16 * i, "text-anchor": "end" }, name)));
  document.getElementById("curve").append(p.root);
  const words = [`photons alone ${digits(mode, 1)} ± ${digits(sigma, 1)}`];
  if (expected !== null) words.push(`expected by the merge ${digits(expected, 1)}`);
  for (const [kind, name] of [["prf", "DIALS, profile fitted"], ["sum", "DIALS, summed"]]) {
    if (dials[kind]) words.push(`${name} ${digits(dials[kind].value, 1)} ± ${digits(dials[kind].sigma, 1)}`);
  }
  if (dials.outlier) words.push("DIALS calls it an outlier");
  if (dials.reason) words.push(`no value of DIALS: ${dials.reason}`);
  document.getElementById("values").textContent = `${words.join("; ")} [photons of the whole spot]`;
}

function drawMates(mates, own) {
  const shown = mates.filter((m) => m.scaled_intensity !== undefined && m.scaled_intensity !== null);
  if (!shown.length) return; // no model, or none of them was merged
  const lows = shown.map((m) => m.scaled_intensity - m.scaled_sigma), highs = shown.map((m) => m.scaled_intensity + m.scaled_sigma);
  const expected = shown.map((m) => m.expected);
  const [low, high] = [Math.min(...lows, ...expected), Math.max(...highs, ...expected)];
  const p = plot(wide(), 280, [0.4, shown.length + 0.6], [low - 0.08 * (high - low), high + 0.12 * (high - low)], "observation, by image", "scaled intensity");
  for (const isPlus of [true, false]) {
    const of = shown.filter((m) => m.plus === isPlus);
    if (!of.length) continue;
    const kind = isPlus ? "plus" : "minus";
    const y = p.y(of[0].expected);
    p.root.append(svg("line", { class: `${kind} line`, x1: p.left, x2: p.right, y1: y, y2: y }));
    p.root.append(svg("text", { class: kind, x: p.right - (isPlus ? 44 : 4), y: p.top + 6, "text-anchor": "end" }, isPlus ? "I(+)" : "I(−)"));
  }
  shown.forEach((m, i) => {
    const x = p.x(i + 1), kind = m.plus ? "plus" : "minus";
    const mark = svg("a", { href: `/reflection/${m.row}` });
    mark.append(svg("line", { class: kind, x1: x, x2: x, y1: p.y(m.scaled_intensity - m.scaled_sigma), y2: p.y(m.scaled_intensity + m.scaled_sigma) }));
    mark.append(svg("circle", { class: kind, cx: x, cy: p.y(m.scaled_intensity), r: 4 }));
    if (m.p_outlier > 0.5) mark.append(svg("circle", { class: "ring", cx: x, cy: p.y(m.scaled_intensity), r: 8 }));
    if (m.row === own) mark.append(svg("rect", { class: "self", x: x - 8, y: p.y(m.scaled_intensity) - 8, width: 16, height: 16 }));
    mark.append(svg("title", {}, `${m.hkl}, image ${m.image}: ${digits(m.scaled_intensity, 1)} ± ${digits(m.scaled_sigma, 1)}, z ${digits(m.z)}`));
    p.root.append(mark);
  });
  document.getElementById("mates").append(p.root);
}

function writeMates(mates, own) {
  const heads = [["index", ""], ["mate", ""], ["image", "n"], ["J [photons]", "n"], ["sigma", "n"], ["scaled", "n"], ["sigma", "n"], ["z", "n"], ["P(outlier)", "n"], ["flags", ""]];
  const head = element("tr", {}, ...heads.map(([name, kind]) => element("th", { class: kind }, name)));
  const body = element("tbody");
  for (const m of mates) {
    const cell = (text) => element("td", { class: "n" }, text);
    body.append(element("tr", m.row === own ? { class: "here" } : {},
      element("td", {}, element("a", { href: `/reflection/${m.row}` }, m.hkl)), element("td", {}, m.plus ? "+" : "−"),
      cell(String(m.image)), cell(digits(m.J, 1)), cell(digits(m.sigma, 1)), cell(digits(m.scaled_intensity, 1)),
      cell(digits(m.scaled_sigma, 1)), cell(digits(m.z)), cell(digits(m.p_outlier, 3)), element("td", {}, m.flags)));
  }
  document.getElementById("table").append(element("table", {}, element("thead", {}, head), body));
}

json(`/reflection/${place.dataset.row}/data`).then((found) => {
  if (found.reason) say(found.reason);
  if (found.box) drawBox(found);
  else document.getElementById("box").textContent = found.reason;
  drawCurve(found);
  drawMates(found.mates, found.row);
  writeMates(found.mates, found.row);
}).catch((error) => say(error.message)).finally(() => place.setAttribute("aria-busy", "false"));
