"use strict";
// The viewer of a report: three planes and a 3-D view by NiiVue. Its data are in the page: "viewer-data" describes the
// cases (mpscl_ray/report/viewer.py), and the element "file-NAME" has each volume as base64 of a .nii.gz file.
const viewer = (() => {
  const cases = JSON.parse(document.getElementById("viewer-data").textContent);
  const at = (id) => document.getElementById(id);
  const SLICE = niivue.SLICE_TYPE;
  const QUARTERS = [
    { sliceType: SLICE.CORONAL, position: [0, 0, 0.5, 0.5] },
    { sliceType: SLICE.SAGITTAL, position: [0.5, 0, 0.5, 0.5] },
    { sliceType: SLICE.AXIAL, position: [0, 0.5, 0.5, 0.5] },
  ];
  const MODES = ["off", "fill", "outline"];
  const CT_WINDOWS = [["heart with contrast", 200, 600], ["soft tissue", 50, 350], ["lung", -500, 1500]];
  const state = { index: -1, modes: {}, hidden: new Set(), opacity: 0.45, layout: "all", blank: false, solid: null };
  const common = {
    dragAndDropEnabled: false, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", logLevel: "error",
    backColor: [0.05, 0.05, 0.06, 1], crosshairColor: [0.98, 0.85, 0.2, 0.75], fontColor: [0.85, 0.85, 0.85, 1],
    loadingText: "",
  };
  const planes = new niivue.Niivue({
    ...common, isRadiologicalConvention: true, isNearestInterpolation: false, crosshairWidth: 0.25, crosshairGap: 12,
    crosshairWidthUnit: "percent", dragMode: niivue.DRAG_MODE.windowing, multiplanarShowRender: 0, tileMargin: 0,
    isForceMouseClickToVoxelCenters: true,
  });
  const solid = new niivue.Niivue({ ...common, sliceType: SLICE.RENDER, show3Dcrosshair: true, isOrientCube: false });
  let overlays = [];
  let opened = Promise.resolve();
  let solidShown = Promise.resolve();

  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const current = () => cases[state.index];
  const load = (name, options = {}) => niivue.NVImage.loadFromBase64({
    base64: at(`file-${name}`).textContent, name: `${name}.nii.gz`, ...options,
  });

  // ------------------------------------------------------------------------------------------------------- colours
  const channel = (colour, start) => parseInt(colour.slice(start, start + 2), 16);
  function colourTable() {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["background"] };
    for (const { index, name, colour } of current().classes) {
      [1, 3, 5].forEach((start, number) => table["RGB"[number]].push(channel(colour, start)));
      table.A.push(state.hidden.has(name) ? 0 : 255);
      table.I.push(index);
      table.labels.push(name);
    }
    return table;
  }

  // Voxels of a label map with a neighbour of another class; the others become background.
  function borders(volume) {
    const [, width, height, depth] = volume.hdr.dims;
    const raw = volume.raw;
    const border = new Uint8Array(raw.length);
    const steps = [1, width, width * height];
    const lengths = [width, height, depth];
    for (let voxel = 0; voxel < raw.length; voxel++) {
      const value = raw[voxel];
      if (!value) continue;
      for (let axis = 0; axis < 3; axis++) {
        const position = Math.floor(voxel / steps[axis]) % lengths[axis];
        const before = position === 0 ? value : raw[voxel - steps[axis]];
        const after = position === lengths[axis] - 1 ? value : raw[voxel + steps[axis]];
        if (before !== value || after !== value) {
          border[voxel] = value;
          break;
        }
      }
    }
    return border;
  }

  function paint() {
    const table = colourTable();
    for (const overlay of overlays) {
      const mode = state.blank ? "off" : state.modes[overlay.title];
      if (mode === "outline" && !overlay.border) overlay.border = borders(overlay.volume);
      overlay.volume.img = mode === "outline" ? overlay.border : overlay.volume.raw;
      overlay.volume.opacity = { off: 0, fill: state.opacity, outline: 1 }[mode];
      overlay.volume.setColormapLabel(table);
    }
    planes.updateGLVolume();
    describe();
  }

  // ------------------------------------------------------------------------------------------------------- the case
  async function show(index) {
    state.index = index;
    const shown = current();
    at("v-case").value = String(index);
    document.querySelectorAll("tr[data-case]").forEach((row) => {
      row.classList.toggle("open", row.dataset.case === shown.key);
    });
    while (planes.volumes.length) planes.removeVolumeByIndex(0);
    const image = await load(shown.image, { colormap: "gray" });
    planes.addVolume(image);
    overlays = [];
    for (const { title, file, dice } of shown.overlays) {
      const volume = await load(file, { opacity: 0, colorbarVisible: false });
      volume.raw = volume.img;
      volume.setColormapLabel(colourTable());
      planes.addVolume(volume);
      overlays.push({ title, file, dice, volume });
    }
    overlays.forEach(({ title }, number) => {
      state.modes[title] ??= number === shown.main ? "fill" : title === "ground truth" ? "outline" : "off";
    });
    planes.opts.isOrientationTextVisible = shown.plane !== null;
    buildWindows(image);
    buildOverlays();
    buildLegend();
    layOut(state.layout);
    goToStructures();
    paint();
    await showSolid();
  }

  function open(key) {
    const index = cases.findIndex((one) => one.key === key);
    opened = opened.then(() => show(index));
    return opened;
  }

  // Voxel of the array at a voxel in RAS+ order, as NiiVue counts them.
  const offset = (volume, [x, y, z]) => {
    const [a, b, c] = volume.img2RASstart;
    const [i, j, k] = volume.img2RASstep;
    return a + b + c + x * i + y * j + z * k;
  };

  // To the slices that show most: the plane through the most voxels of structures, along each axis.
  function goToStructures() {
    const truth = overlays.find(({ title }) => title === "ground truth") ?? overlays[current().main];
    const { raw, hdr, img2RASstep } = truth.volume;
    const [, width, height, depth] = hdr.dims;
    const counts = [width, height, depth].map((length) => new Uint32Array(length));
    for (let voxel = 0; voxel < raw.length; voxel++) {
      if (raw[voxel] === 0 || raw[voxel] === 255) continue;
      const row = Math.floor(voxel / width);
      counts[0][voxel - row * width]++;
      counts[1][row % height]++;
      counts[2][Math.floor(row / height)]++;
    }
    const best = counts.map((count) => (count.some((n) => n) ? count.indexOf(Math.max(...count)) : count.length >> 1));
    goTo(Array.from(img2RASstep, (step) => {
      const axis = [1, width, width * height].indexOf(Math.abs(step));
      return step > 0 ? best[axis] : counts[axis].length - 1 - best[axis];
    }));
  }

  function goTo(voxel) {
    planes.scene.crosshairPos = planes.vox2frac(voxel);
    planes.drawScene();
    planes.createOnLocationChange();
  }

  // --------------------------------------------------------------------------------------------------------- layout
  function layOut(layout) {
    state.layout = layout;
    at("v-stage").className = `stage ${layout}`;
    const single = { axial: SLICE.AXIAL, coronal: SLICE.CORONAL, sagittal: SLICE.SAGITTAL }[layout];
    if (layout !== "solid") {
      planes.setCustomLayout(single === undefined ? QUARTERS : [{ sliceType: single, position: [0, 0, 1, 1] }]);
    }
    document.querySelectorAll("#v-layouts button").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.layout === layout));
    });
    planes.resizeListener();
    solid.resizeListener();
  }

  // ---------------------------------------------------------------------------------------------------------- panel
  function buildOverlays() {
    const rows = overlays.map((overlay, number) => {
      const choices = MODES.map((mode) => element("button", {
        type: "button", textContent: mode, title: `key ${number + 1} changes it`,
        ariaPressed: String(state.modes[overlay.title] === mode),
        onclick: () => setMode(overlay.title, mode),
      }));
      const values = Object.values(overlay.dice ?? {}).filter((value) => value !== null);
      const mean = values.length ? `Dice ${(100 * values.reduce((a, b) => a + b) / values.length).toFixed(1)}` : "";
      return element("div", { className: "overlay" },
        element("span", { textContent: overlay.title }), element("span", { className: "dice", textContent: mean }),
        element("span", { className: "modes" }, ...choices));
    });
    at("v-overlays").replaceChildren(...rows);
    const options = overlays.map(({ title, file }) => element("option", { value: file, textContent: title }));
    at("v-solid").replaceChildren(...options);
  }

  function setMode(title, mode) {
    state.modes[title] = mode;
    state.blank = false;
    buildOverlays();
    paint();
    if (mode !== "off") state.solid = title;
    solidShown = solidShown.then(showSolid);
  }

  function buildLegend() {
    const rows = current().classes.map(({ name, colour }) => {
      const box = element("input", {
        type: "checkbox", checked: !state.hidden.has(name),
        onchange: () => {
          state.hidden[state.hidden.has(name) ? "delete" : "add"](name);
          paint();
          solidShown = solidShown.then(showSolid);
        },
      });
      const swatch = element("i", { className: "swatch" });
      swatch.style.background = colour;
      return element("label", {}, box, swatch, name);
    });
    at("v-legend").replaceChildren(...rows);
  }

  function buildWindows(image) {
    const unit = current().unit;
    const full = [image.global_min, image.global_max];
    const robust = [image.robust_min, image.robust_max];
    const choices = [["automatic", ...robust], ["full range", ...full]];
    if (unit === "HU") {
      choices.unshift(...CT_WINDOWS.map(([name, level, width]) => [name, level - width / 2, level + width / 2]));
    }
    const options = choices.map(([name, low, high]) => element("option", { value: `${low},${high}`, textContent: name }));
    const own = element("option", { value: "", textContent: "own", hidden: true });
    at("v-window").replaceChildren(...options, own);
    at("v-unit").textContent = unit ? ` (${unit})` : "";
    setWindow(choices[0][1], choices[0][2]);
  }

  function setWindow(low, high) {
    planes.volumes[0].cal_min = low;
    planes.volumes[0].cal_max = Math.max(high, low + 1e-6);
    planes.updateGLVolume();
    showWindow();
  }

  function showWindow() {
    const { cal_min: low, cal_max: high } = planes.volumes[0];
    const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.max(high - low, 1e-6))));
    at("v-level").value = ((low + high) / 2).toFixed(digits);
    at("v-width").value = (high - low).toFixed(digits);
    const preset = [...at("v-window").options].find(({ value }) => {
      const [from, to] = value.split(",").map(Number);
      return value && Math.abs(from - low) + Math.abs(to - high) < 1e-3 * (high - low);
    });
    at("v-window").value = preset ? preset.value : "";
  }

  // What the image and each overlay have at the crosshair.
  function describe() {
    if (!planes.volumes.length) return;
    const frac = planes.scene.crosshairPos;
    const voxel = planes.frac2vox(frac);
    const image = planes.volumes[0];
    const shown = current();
    const [, width, height] = image.hdr.dims;
    const stored = offset(image, voxel);
    const grey = image.img[stored] * image.hdr.scl_slope + image.hdr.scl_inter;
    const place = [Math.floor(stored / (width * height)), Math.floor(stored / width) % height, stored % width];
    const rows = [["slice, row, column", place.join(", "), ""], ["image", `${grey.toPrecision(4)} ${shown.unit}`, ""]];
    for (const { title, volume } of overlays) {
      const value = volume.raw[offset(volume, voxel)];
      const found = shown.classes.find(({ index }) => index === value);
      rows.push([title, found ? found.name : "–", found ? found.colour : ""]);
    }
    at("v-readout").replaceChildren(...rows.map(([name, text, colour]) => {
      const swatch = element("i", { className: "swatch" });
      swatch.style.background = colour || "transparent";
      return element("tr", {}, element("td", { textContent: name }), element("td", {}, swatch, text));
    }));
    solid.scene.crosshairPos = frac;
    solid.drawScene();
  }

  async function showSolid() {
    const title = state.modes[state.solid] && overlays.some((one) => one.title === state.solid)
      ? state.solid : overlays[current().main].title;
    const overlay = overlays.find((one) => one.title === title);
    at("v-solid").value = overlay.file;
    const volume = await load(overlay.file, { colorbarVisible: false });
    volume.setColormapLabel(colourTable());
    while (solid.volumes.length) solid.removeVolumeByIndex(0);
    solid.addVolume(volume);
    await solid.setVolumeRenderIllumination(0.7);
    solid.setRenderAzimuthElevation(solid.scene.renderAzimuth, solid.scene.renderElevation);
    solid.scene.crosshairPos = planes.scene.crosshairPos;
    solid.drawScene();
  }

  // --------------------------------------------------------------------------------------------------------- events
  function connect() {
    at("v-case").replaceChildren(...cases.map((one, index) => element("option", {
      value: String(index), textContent: `${one.id} (${one.target}, ${one.split})`,
    })));
    at("v-case").onchange = (event) => open(cases[Number(event.target.value)].key);
    const step = (by) => open(cases[(state.index + by + cases.length) % cases.length].key);
    at("v-previous").onclick = () => step(-1);
    at("v-next").onclick = () => step(1);
    document.querySelectorAll("#v-layouts button").forEach((button) => {
      button.onclick = () => layOut(button.dataset.layout);
    });
    at("v-opacity").oninput = (event) => { state.opacity = Number(event.target.value) / 100; paint(); };
    at("v-window").onchange = (event) => setWindow(...event.target.value.split(",").map(Number));
    const own = () => {
      const [level, width] = [Number(at("v-level").value), Number(at("v-width").value)];
      setWindow(level - width / 2, level + width / 2);
    };
    at("v-level").onchange = at("v-width").onchange = own;
    at("v-solid").onchange = (event) => {
      state.solid = overlays.find(({ file }) => file === event.target.value).title;
      solidShown = solidShown.then(showSolid);
    };
    planes.onLocationChange = describe;
    planes.onIntensityChange = showWindow;
    document.querySelectorAll("tr[data-case]").forEach((row) => {
      const go = () => open(row.dataset.case).then(() => at("viewer").scrollIntoView({ block: "start" }));
      row.onclick = go;
      row.onkeydown = (event) => { if (event.key === "Enter") go(); };
    });
    at("viewer").addEventListener("keydown", (event) => {
      if (event.target.matches("input, select")) return;
      const overlay = overlays[Number(event.key) - 1];
      if (overlay) setMode(overlay.title, MODES[(MODES.indexOf(state.modes[overlay.title]) + 1) % 3]);
      else if (event.key === "n") step(1);
      else if (event.key === "p") step(-1);
      else if (event.key === "h") { state.blank = !state.blank; paint(); }
    });
  }

  async function start() {
    await planes.attachToCanvas(at("v-planes"), true);
    await solid.attachToCanvas(at("v-render"), true);
    connect();
    await open(cases[0].key);
  }
  const ready = start().catch((error) => {
    at("v-problem").textContent = `The viewer needs a browser with WebGL2: ${error}`;
    at("v-problem").hidden = false;
    throw error;
  });
  return { ready, open, goTo, setMode, state, planes, cases, settled: () => opened.then(() => solidShown) };
})();
