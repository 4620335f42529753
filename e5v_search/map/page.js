"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const xy = new Float32Array(bytes(data.xy).buffer);
  const kindOf = bytes(data.kind);
  const n = kindOf.length;
  const kinds = data.kinds;
  const canvas = $("map");
  const context = canvas.getContext("2d");
  const number = (value) => value.toLocaleString("en");
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

  // --- what is shown of each item

  const name = (i) => data.names[i];
  const place = (i) => data.places[data.place[i]];
  const picture = (i) => (data.thumbnails[i] ? `data:image/jpeg;base64,${data.thumbnails[i]}` : "");
  const lower = data.names.map((text, i) => `${text}\n${place(i)}`.toLowerCase());
  const on = kinds.map(() => true);
  let words = "";
  const matches = new Uint8Array(n).fill(1);
  const visible = (i) => on[kindOf[i]] && matches[i];

  // --- the world: the points in [-1, 1]; the view: which point of it is in the middle, and pixels per unit

  let low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  for (let i = 0; i < n; i++) for (const a of [0, 1]) {
    low[a] = Math.min(low[a], xy[2 * i + a]);
    high[a] = Math.max(high[a], xy[2 * i + a]);
  }
  const half = Math.max(high[0] - low[0], high[1] - low[1], 1e-9) / 2;
  const X = new Float32Array(n), Y = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    X[i] = (xy[2 * i] - (low[0] + high[0]) / 2) / half;
    Y[i] = -(xy[2 * i + 1] - (low[1] + high[1]) / 2) / half; // upwards is up
  }
  const extent = [Math.max((high[0] - low[0]) / half, 1e-3), Math.max((high[1] - low[1]) / half, 1e-3)];
  const view = { x: 0, y: 0, scale: 1 };
  let width = 0, height = 0, ratio = 1, fitted = 1;
  const left = (x) => (x - view.x) * view.scale + width / 2;
  const top = (y) => (y - view.y) * view.scale + height / 2;

  // items by cell, so that the one under the pointer is found without looking at all
  const SIDE = 256;
  const cell = (v) => Math.max(0, Math.min(SIDE - 1, Math.floor(((v + 1) / 2) * SIDE)));
  const starts = new Uint32Array(SIDE * SIDE + 1), members = new Uint32Array(n);
  for (let i = 0; i < n; i++) starts[cell(Y[i]) * SIDE + cell(X[i]) + 1]++;
  for (let c = 0; c < SIDE * SIDE; c++) starts[c + 1] += starts[c];
  const filled = starts.slice();
  for (let i = 0; i < n; i++) members[filled[cell(Y[i]) * SIDE + cell(X[i])]++] = i;

  function* within(x0, y0, x1, y1) {
    for (let row = cell(y0); row <= cell(y1); row++) {
      const last = starts[row * SIDE + cell(x1) + 1];
      for (let at = starts[row * SIDE + cell(x0)]; at < last; at++) yield members[at];
    }
  }

  function nearest(px, py, reach) {
    const x = (px - width / 2) / view.scale + view.x, y = (py - height / 2) / view.scale + view.y;
    const r = reach / view.scale;
    let best = -1, least = r * r;
    for (const i of within(x - r, y - r, x + r, y + r)) {
      const d = (X[i] - x) ** 2 + (Y[i] - y) ** 2;
      if (d <= least && visible(i)) [best, least] = [i, d];
    }
    return best;
  }

  // --- drawing: the points go to a sheet of their own, which is moved and stretched while a hand is faster than they are

  const sheet = document.createElement("canvas");
  const sheetContext = sheet.getContext("2d");
  const sheetView = { x: 0, y: 0, scale: 1 };
  let colours = [], ink = "", paper = "", line = "";
  let stale = true, cost = 0, settle = 0, asked = false;

  function readColours() {
    const style = getComputedStyle(document.documentElement);
    colours = kinds.map((kind) => style.getPropertyValue(`--${kind.name}`).trim());
    [ink, paper, line] = ["--ink", "--panel", "--line"].map((v) => style.getPropertyValue(v).trim());
    changed();
  }

  function radius() {
    const base = n > 30000 ? 1.3 : n > 5000 ? 2 : n > 800 ? 2.8 : 4;
    return base * Math.min(2.6, Math.max(1, (view.scale / fitted) ** 0.35));
  }

  function dot(colour, r, alpha) {
    const size = Math.ceil(2 * r + 2), sprite = document.createElement("canvas");
    sprite.width = sprite.height = size;
    const c = sprite.getContext("2d");
    c.globalAlpha = alpha;
    c.fillStyle = colour;
    c.beginPath();
    c.arc(size / 2, size / 2, r, 0, 2 * Math.PI);
    c.fill();
    return sprite;
  }

  function drawPoints() {
    const start = performance.now(), r = radius() * ratio, c = sheetContext;
    [sheet.width, sheet.height] = [canvas.width, canvas.height];
    Object.assign(sheetView, view);
    const s = view.scale * ratio, dx = sheet.width / 2 - view.x * s, dy = sheet.height / 2 - view.y * s;
    const alpha = n > 5000 ? 0.7 : 0.85;
    for (const dim of words ? [true, false] : [false]) for (let k = 0; k < kinds.length; k++) {
      if (!on[k]) continue;
      const sprite = dot(colours[k], r, dim ? 0.12 : alpha), off = sprite.width / 2;
      for (let i = 0; i < n; i++) {
        if (kindOf[i] !== k || (matches[i] === 0) !== dim) continue;
        const px = X[i] * s + dx, py = Y[i] * s + dy;
        if (px > -off && py > -off && px < sheet.width + off && py < sheet.height + off) c.drawImage(sprite, px - off, py - off);
      }
    }
    stale = false;
    cost = performance.now() - start;
  }

  // pictures: as many as find room, first those in the middle of a cell; they are chosen anew at steps of the zoom only, and
  // by where they are in the world, so that they stay while one moves
  const CELL = 80, PICTURE = 64;
  const images = new Map();
  let chosen = [], chosenFor = "";

  function choose() {
    const level = Math.floor(3 * Math.log2(view.scale / CELL)), size = 2 ** (-level / 3), room = PICTURE / CELL;
    const key = `${level} ${on} ${words}`;
    if (key === chosenFor) return;
    chosenFor = key;
    const off = (v) => Math.abs(v / size - Math.floor(v / size) - 0.5);
    const candidates = [];
    for (let i = 0; i < n; i++) if (data.thumbnails[i] && visible(i)) candidates.push([Math.max(off(X[i]), off(Y[i])), i]);
    candidates.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const kept = new Map(); // cell -> items in it
    chosen = [];
    for (const [, i] of candidates) {
      const cx = Math.floor(X[i] / size), cy = Math.floor(Y[i] / size);
      const covered = [-1, 0, 1].some((dx) => [-1, 0, 1].some((dy) => (kept.get(`${cx + dx} ${cy + dy}`) ?? []).some(
        (other) => Math.abs(X[i] - X[other]) < room * size && Math.abs(Y[i] - Y[other]) < room * size)));
      if (covered) continue;
      chosen.push(i);
      kept.set(`${cx} ${cy}`, [...(kept.get(`${cx} ${cy}`) ?? []), i]);
    }
  }

  function pictureAt(px, py) {
    if (!$("pictures").checked) return -1;
    return chosen.findLast((i) => Math.abs(left(X[i]) - px) < PICTURE / 2 && Math.abs(top(Y[i]) - py) < PICTURE / 2) ?? -1;
  }

  function under(px, py) {
    const point = nearest(px, py, 6), covering = pictureAt(px, py);
    return covering >= 0 && point !== covering ? covering : point >= 0 ? point : nearest(px, py, 18);
  }

  function image(i) {
    let found = images.get(i);
    if (!found) {
      found = new Image();
      found.onload = ask;
      found.src = picture(i);
      if (images.size > 600) images.delete(images.keys().next().value);
    } else images.delete(i);
    images.set(i, found);
    return found;
  }

  function drawPicture(i, size, ring) {
    const img = image(i);
    if (!img.complete || !img.naturalWidth) return;
    const shrink = Math.min(size / img.naturalWidth, size / img.naturalHeight);
    const w = img.naturalWidth * shrink, h = img.naturalHeight * shrink, x = left(X[i]) - w / 2, y = top(Y[i]) - h / 2;
    context.save();
    context.beginPath();
    context.roundRect(x, y, w, h, 5);
    context.save();
    context.clip();
    context.drawImage(img, x, y, w, h);
    context.restore();
    context.lineWidth = ring ? 3 : 1.5;
    context.strokeStyle = ring ? ink : colours[kindOf[i]];
    context.stroke();
    context.restore();
  }

  function drawPictures() {
    choose();
    for (const i of chosen) {
      const x = left(X[i]), y = top(Y[i]);
      if (x > -PICTURE && y > -PICTURE && x < width + PICTURE && y < height + PICTURE) drawPicture(i, PICTURE, false);
    }
  }

  function mark(i) {
    if ($("pictures").checked && data.thumbnails[i]) drawPicture(i, PICTURE * 1.25, true);
    context.beginPath();
    context.arc(left(X[i]), top(Y[i]), radius() + 3, 0, 2 * Math.PI);
    context.lineWidth = 2.5;
    context.strokeStyle = paper;
    context.stroke();
    context.lineWidth = 1.5;
    context.strokeStyle = ink;
    context.stroke();
  }

  function frame() {
    asked = false;
    if (stale && (cost < 24 || performance.now() >= settle)) drawPoints();
    else if (stale) setTimeout(ask, settle - performance.now() + 1);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const zoom = view.scale / sheetView.scale;
    const w = (sheet.width / ratio) * zoom, h = (sheet.height / ratio) * zoom;
    context.drawImage(sheet, left(sheetView.x) - w / 2, top(sheetView.y) - h / 2, w, h);
    if ($("pictures").checked) drawPictures();
    if (picked >= 0) mark(picked);
    if (hovered >= 0 && hovered !== picked) mark(hovered);
    placeCard();
  }

  function ask() {
    if (!asked) requestAnimationFrame(frame);
    asked = true;
  }

  function changed() {
    stale = true;
    settle = performance.now() + 120;
    ask();
  }

  // --- one item: under the pointer, or picked

  let hovered = -1, picked = -1, shown = -1;

  function hover(i) {
    if (i === hovered) return;
    hovered = i;
    canvas.classList.toggle("over", i >= 0);
    ask();
  }

  function pick(i) {
    picked = i;
    if (i >= 0) $("said").textContent = [kinds[kindOf[i]].noun, name(i), data.notes[i], place(i)].filter(Boolean).join(", ");
    ask();
  }

  function placeCard() {
    const i = hovered >= 0 ? hovered : picked, card = $("card");
    card.hidden = i < 0;
    if (i < 0) { shown = -1; return; }
    if (i !== shown) {
      shown = i;
      $("thumb").hidden = !data.thumbnails[i];
      $("thumb").src = picture(i) || "data:,";
      $("thumb").alt = name(i);
      $("name").textContent = name(i);
      $("place").textContent = place(i);
      $("note").textContent = [kinds[kindOf[i]].noun, data.notes[i]].filter(Boolean).join(" · ");
    }
    const x = left(X[i]), y = top(Y[i]), gap = 16 + ($("pictures").checked && data.thumbnails[i] ? PICTURE / 2 : 0);
    const w = card.offsetWidth, h = card.offsetHeight;
    const at = x + gap + w < width ? x + gap : x - gap - w;
    card.style.transform = `translate(${Math.max(8, Math.min(at, width - w - 8))}px, ${Math.max(8, Math.min(y - h / 2, height - h - 8))}px)`;
  }
  $("thumb").addEventListener("load", ask);

  // --- moving

  function fit() {
    fitted = Math.min(width / extent[0], height / extent[1]) * 0.86;
    Object.assign(view, { x: 0, y: 0, scale: fitted });
    moved();
  }

  function moved() {
    changed();
    listSoon();
  }

  function zoomAt(px, py, by) {
    const scale = Math.max(fitted * 0.4, Math.min(fitted * 4000, view.scale * by));
    view.x += (px - width / 2) * (1 / view.scale - 1 / scale);
    view.y += (py - height / 2) * (1 / view.scale - 1 / scale);
    view.scale = scale;
    moved();
  }

  function flyTo(i) {
    const from = { ...view }, scale = Math.max(view.scale, fitted * 3), start = performance.now();
    (function step() {
      const t = still ? 1 : Math.min(1, (performance.now() - start) / 350), e = 1 - (1 - t) ** 3;
      view.scale = from.scale * (scale / from.scale) ** e;
      view.x = from.x + (X[i] - from.x) * e;
      view.y = from.y + (Y[i] - from.y) * e;
      changed();
      if (t < 1) requestAnimationFrame(step);
    })();
  }

  const fingers = new Map();
  let travelled = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
    travelled = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId), here = [event.offsetX, event.offsetY];
    if (!before) { hover(under(...here)); return; }
    travelled += Math.hypot(here[0] - before[0], here[1] - before[1]);
    if (fingers.size === 1) {
      view.x -= (here[0] - before[0]) / view.scale;
      view.y -= (here[1] - before[1]) / view.scale;
    } else {
      const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      zoomAt(...other, Math.hypot(here[0] - other[0], here[1] - other[1]) / Math.max(1, Math.hypot(before[0] - other[0], before[1] - other[1])));
    }
    fingers.set(event.pointerId, here);
    canvas.classList.add("moving");
    moved();
  });
  const release = (event) => {
    if (event.type === "pointerup" && travelled < 4 && fingers.size === 1) pick(under(event.offsetX, event.offsetY));
    fingers.delete(event.pointerId);
    canvas.classList.remove("moving");
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => hover(-1));
  canvas.addEventListener("dblclick", (event) => zoomAt(event.offsetX, event.offsetY, 2));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomAt(event.offsetX, event.offsetY, Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)));
  }, { passive: false });
  $("in").addEventListener("click", () => zoomAt(width / 2, height / 2, 1.6));
  $("out").addEventListener("click", () => zoomAt(width / 2, height / 2, 1 / 1.6));
  $("all").addEventListener("click", fit);

  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = STEPS[event.key];
    if (step) {
      view.x += (step[0] * 60) / view.scale;
      view.y += (step[1] * 60) / view.scale;
      moved();
      hover(nearest(width / 2, height / 2, 80));
    } else if (event.key === "+" || event.key === "=") zoomAt(width / 2, height / 2, 1.4);
    else if (event.key === "-") zoomAt(width / 2, height / 2, 1 / 1.4);
    else if (event.key === "0" || event.key === "Home") fit();
    else if (event.key === "Enter") pick(hovered >= 0 ? hovered : nearest(width / 2, height / 2, 1e9));
    else if (event.key === "Escape") { hover(-1); pick(-1); }
    else return;
    event.preventDefault();
  });

  // --- the list: what was found, or what is in view

  const LISTED = 100;
  let listTimer = 0;
  function listSoon() {
    clearTimeout(listTimer);
    listTimer = setTimeout(list, 150);
  }

  function list() {
    const found = [];
    const w = width / view.scale / 2, h = height / view.scale / 2;
    let all = 0;
    const candidates = words ? members : within(view.x - w, view.y - h, view.x + w, view.y + h);
    for (const i of candidates) {
      if (!visible(i) || (!words && (Math.abs(X[i] - view.x) > w || Math.abs(Y[i] - view.y) > h))) continue;
      all++;
      found.push(i);
    }
    const far = (i) => (X[i] - view.x) ** 2 + (Y[i] - view.y) ** 2;
    if (found.length <= 20000) found.sort((a, b) => far(a) - far(b));
    $("found").textContent = `${number(all)} ${words ? "found" : "in view"}${all > LISTED ? `, the ${LISTED} nearest the middle listed` : ""}`;
    $("list").replaceChildren(...found.slice(0, LISTED).map(entry));
  }

  function entry(i) {
    const item = document.createElement("li"), button = document.createElement("button"), label = document.createElement("span");
    const face = document.createElement(data.thumbnails[i] ? "img" : "i");
    if (data.thumbnails[i]) {
      face.loading = "lazy";
      face.alt = "";
      face.src = picture(i);
    } else face.textContent = kinds[kindOf[i]].name === "image" ? "▣" : "¶";
    label.textContent = name(i);
    button.append(face, label);
    button.addEventListener("click", () => { pick(i); flyTo(i); });
    button.addEventListener("mouseenter", () => hover(i));
    button.addEventListener("focus", () => hover(i));
    button.addEventListener("mouseleave", () => hover(-1));
    button.addEventListener("blur", () => hover(-1));
    item.append(button);
    return item;
  }

  $("query").addEventListener("input", (event) => {
    words = event.target.value.trim().toLowerCase();
    const parts = words.split(/\s+/);
    for (let i = 0; i < n; i++) matches[i] = !words || parts.every((part) => lower[i].includes(part)) ? 1 : 0;
    hover(-1);
    moved();
  });
  $("pictures").addEventListener("change", ask);

  // --- what the page says

  $("title").textContent = data.title;
  $("about").textContent = data.about;
  $("facts").textContent = data.facts;
  canvas.setAttribute("aria-label", `Map of ${number(n)} items`);
  kinds.forEach((kind, k) => {
    const button = document.createElement("button"), swatch = document.createElement("i"), count = document.createElement("span");
    swatch.className = kind.name;
    count.textContent = number(kind.count);
    button.append(swatch, kind.label, count);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      on[k] = !on[k];
      button.setAttribute("aria-pressed", String(on[k]));
      moved();
    });
    $("kinds").append(button);
  });
  $("gaps").hidden = !data.gaps.length;
  for (const gap of data.gaps) {
    const row = document.createElement("tr");
    const spread = document.createElement("small");
    spread.textContent = ` / ${gap.spread.toFixed(2)}`;
    const cells = [`${gap.a} – ${gap.b}`, gap.distance.toFixed(2), percent(gap.accuracy)].map((text) => {
      const td = document.createElement("td");
      td.textContent = text;
      return td;
    });
    cells[1].append(spread);
    row.append(...cells);
    document.querySelector("#gaps tbody").append(row);
  }

  new ResizeObserver(() => {
    const first = !width;
    [width, height, ratio] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio || 1];
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (first) fit();
    else changed();
  }).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
  readColours();
})();
