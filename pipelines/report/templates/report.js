// Draws the panels of the page from the numbers beside it. No network.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("numbers").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let isPrinting = false;

  const isDark = () => dark.matches && !isPrinting;
  const LIGHT = { ink: "#1c2330", soft: "#5c6675", line: "#dfe3e8", paper: "#ffffff",
    0: "#0072b2", 1: "#d55e00", 2: "#009e73", 3: "#b3589a", 4: "#b07d00", 5: "#3a8fc4", 6: "#444c56" };
  const DARK = { ink: "#e6e9ee", soft: "#9aa6b4", line: "#333c48", paper: "#171c23",
    0: "#58a6e8", 1: "#f0883e", 2: "#3fb68b", 3: "#d98cc3", 4: "#e3b341", 5: "#8cc8f0", 6: "#adbac7" };
  const colour = name => (isDark() ? DARK : LIGHT)[name];

  // Two-sided scales whose middle is the paper: @map is zero at a fifth, @sides in the middle;
  // @density begins with it.
  const scales = name => ({
    "@map": [[0, "#c0392b"], [0.2, colour("paper")], [0.45, isDark() ? "#2f6ea8" : "#9ecae1"],
             [1, isDark() ? "#cfe8ff" : "#08306b"]],
    "@density": [[0, colour("paper")], [0.35, isDark() ? "#2f6ea8" : "#9ecae1"], [1, isDark() ? "#cfe8ff" : "#08306b"]],
    "@sides": [[0, "#c0392b"], [0.5, colour("paper")], [1, "#2166ac"]],
  })[name];

  function themed(value) {
    if (typeof value === "string" && value[0] === "@") return scales(value) || colour(value.slice(1));
    if (Array.isArray(value)) {
      return typeof value[0] === "object" && value[0] !== null ? value.map(themed) : value;
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) =>
      [k, (k === "text" || k === "name") && typeof v === "string" ? v : themed(v)]));
  }

  function layoutOf(panel) {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("soft"),
      automargin: true, title: { standoff: 6 } };
    const given = themed(panel.layout);
    const join = own => ({ ...axis, ...own, title: { ...axis.title, ...(own && own.title) } });
    return { ...given, xaxis: join(given.xaxis), yaxis: join(given.yaxis), height: panel.height,
      margin: { l: 46, r: 12, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("ink"), size: 12, family: "system-ui, sans-serif" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      hoverlabel: { font: { size: 12 } }, ...(given.barmode ? { barmode: given.barmode } : {}) };
  }

  async function draw(place) {
    const panel = data.panels[place.dataset.panel];
    await Plotly.react(place, themed(panel.traces), layoutOf(panel),
      { responsive: true, displayModeBar: false });
    place.dataset.drawn = "true";
  }

  // Viridis at eight points, and red - paper - blue for residuals.
  const VIRIDIS = [[68, 1, 84], [70, 50, 126], [54, 92, 141], [39, 127, 142], [31, 161, 135],
    [74, 193, 109], [160, 218, 57], [253, 231, 37]];
  function mixed(list, t) {
    const x = Math.min(Math.max(t, 0), 1) * (list.length - 1), i = Math.min(Math.floor(x), list.length - 2);
    return list[i].map((c, k) => c + (x - i) * (list[i + 1][k] - c));
  }
  function picture(canvas) {
    const box = data.boxes[canvas.dataset.box], values = box[canvas.dataset.name];
    const top = Math.max(1, ...box.counts.flat().filter(v => v !== null));
    const [height, width] = [values.length, values[0].length];
    canvas.width = width; canvas.height = height;
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    const middle = isDark() ? [23, 28, 35] : [255, 255, 255];
    const sides = [[33, 102, 172], middle, [192, 57, 43]];
    values.flat().forEach((v, i) => {
      const rgb = v === null ? null : canvas.dataset.name === "residual"
        ? mixed(sides, (v + 4) / 8) : mixed(VIRIDIS, Math.sqrt(Math.max(v, 0) / top));
      image.data.set(rgb ? [...rgb, 255] : [128, 128, 128, 60], 4 * i);
    });
    context.putImageData(image, 0, 0);
    canvas.dataset.drawn = "true";
    canvas.onmousemove = event => {
      const r = canvas.getBoundingClientRect();
      const x = Math.floor((event.clientX - r.left) / r.width * width);
      const y = Math.floor((event.clientY - r.top) / r.height * height);
      canvas.title = values[y] && values[y][x] !== null ? String(values[y][x]) : "not valid";
    };
  }

  // ---- three dimensions, on demand
  function bytes(text) {
    return Float32Array.from(atob(text), c => c.charCodeAt(0));
  }
  function load3d() {
    if (window.$3Dmol) return;
    const script = document.createElement("script");
    script.textContent = document.getElementById("library-3d").textContent;
    document.head.append(script);
  }
  function openSpace(host) {
    const scene = data.spaces[host.dataset.space], view = host.querySelector(".space");
    host.querySelector(".controls").hidden = false; view.hidden = false;
    host.querySelector("button.open").hidden = true;
    load3d();
    let viewer;
    try { viewer = $3Dmol.createViewer(view, { backgroundColor: colour("paper") }); }
    catch (error) { viewer = null; }
    if (!viewer) { view.textContent = "This browser has no WebGL: the sections above show the same map."; return; }
    viewer.addModel(scene.model, "pdb");
    viewer.setStyle({}, { cartoon: { color: isDark() ? "#8b98a8" : "#9aa5b1", opacity: 0.8 } });
    viewer.addStyle({ hetflag: true }, { stick: { radius: 0.12 } });
    scene.sites.filter(site => site.label).forEach(site => {
      const [x, y, z] = site.at;
      viewer.addLabel(site.label, { position: { x, y, z }, fontSize: 12, fontColor: colour("ink"),
        showBackground: false, alignment: "bottomLeft" });
    });
    const volume = (site, name) => {
      const v = new $3Dmol.VolumeData("", "none");
      const n = scene.size, s = scene.step, [x, y, z] = site.origin;
      v.size = { x: n, y: n, z: n }; v.unit = { x: s, y: s, z: s };
      v.origin = new $3Dmol.Vector3(x, y, z); v.data = bytes(site.maps[name]);
      return v;
    };
    const chosen = host.querySelector("select"), slider = host.querySelector("input"), shown = host.querySelector("output");
    const show = () => {
      viewer.removeAllShapes();
      shown.textContent = `${slider.value} σ`;
      const isoval = slider.value / scene.level;
      scene.sites.map(site => volume(site, chosen.value)).filter(v => Math.max(...v.data) > isoval).forEach(v =>
        viewer.addIsosurface(v, { isoval, color: colour(1), opacity: 0.85, smoothness: 1 }));
      viewer.render();
    };
    chosen.onchange = slider.onchange = show;
    viewer.zoomTo({ model: 0 }); viewer.zoom(1.3); show();
    view.dataset.drawn = "true";
  }
  document.querySelectorAll("[data-space]").forEach(host => {
    host.querySelector("button.open").onclick = () => openSpace(host);
  });

  // ---- all of it, the first screen first
  const plots = [...document.querySelectorAll("[data-panel]")];
  const pictures = [...document.querySelectorAll("canvas[data-box]")];
  async function drawAll() {
    for (const place of plots) {
      await draw(place);
      if (!isPrinting) await new Promise(done => setTimeout(done));
    }
    pictures.forEach(picture);
    document.documentElement.dataset.drawn = "true";
  }
  dark.addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => {
    isPrinting = true; plots.forEach(place => { draw(place); Plotly.Plots.resize(place); }); pictures.forEach(picture);
  });
  window.addEventListener("afterprint", () => { isPrinting = false; drawAll(); });
  drawAll();
})();
