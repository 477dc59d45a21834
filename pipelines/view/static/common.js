// What the pages share: answers of the server, elements, SVG, colours.

export async function answer(address) {
  const response = await fetch(address, { headers: { accept: "application/json" } });
  if (!response.ok) {
    const text = await response.text();
    let words = text;
    try { words = JSON.parse(text).error; } catch { /* plain text as it is */ }
    throw new Error(words);
  }
  return response;
}

export const json = async (address) => (await answer(address)).json();

export function say(text) {
  const place = document.getElementById("message");
  place.textContent = text;
  place.hidden = !text;
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Round numbers between two values, about n of them.
export function ticks(low, high, n = 6) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-9); k++) found.push(k * step);
  return found;
}

export const digits = (value, n = 2) => (value === null || value === undefined ? "–" : value.toFixed(n));
export const short = (value) => (value === 0 ? "0" : Number(value.toPrecision(6)).toString());

// Axes of a plot, and functions from values to places.
export function plot(width, height, xs, ys, xName, yName) {
  const [left, right, top, bottom] = [62, 14, 16, 42];
  const x = (v) => left + ((v - xs[0]) / (xs[1] - xs[0] || 1)) * (width - left - right);
  const y = (v) => height - bottom - ((v - ys[0]) / (ys[1] - ys[0] || 1)) * (height - top - bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  for (const t of ticks(...xs, width < 500 ? 4 : 7)) {
    root.append(svg("line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: height - bottom }));
    root.append(svg("text", { x: x(t), y: height - bottom + 16, "text-anchor": "middle" }, short(t)));
  }
  for (const t of ticks(...ys, 5)) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }));
    root.append(svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, short(t)));
  }
  root.append(svg("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }));
  root.append(svg("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, xName));
  root.append(svg("text", { x: 0, y: 11 }, yName));
  return { root, x, y, left, right: width - right, top, bottom: height - bottom };
}

// From -1, blue, over white to 1, red.
export function blueRed(v) {
  const t = Math.max(-1, Math.min(1, v));
  const mix = (a, b, s) => Math.round(a + (b - a) * s);
  return t < 0
    ? [mix(247, 33, -t), mix(247, 102, -t), mix(247, 172, -t)]
    : [mix(247, 178, t), mix(247, 24, t), mix(247, 43, t)];
}
