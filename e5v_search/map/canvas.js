// A canvas of many points with pictures between them, to be moved, zoomed, pointed at and selected from. What a point is,
// its owner knows: options.picture(i) is the address of its picture or "", options.visible(i) whether it is drawn,
// options.faint(i) whether it is drawn faintly. Told are options.hovered(i), options.picked(i), options.moved() and
// options.selected(indices); -1 is no point.
"use strict";
class PointMap {
  static SIDE = 256; // cells of the world, by which what is under the pointer is found
  static CELL = 80; // pixels, of which at most one picture has the middle
  static PICTURE = 64;
  static KEPT = 600; // pictures in memory

  constructor(canvas, options) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.options = { picture: () => "", visible: () => true, faint: () => false, pictures: () => true, hovered() {}, picked() {}, moved() {}, selected() {}, ...options };
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.view = { x: 0, y: 0, scale: 1 }; // which point of the world is in the middle, and pixels per unit
    this.width = this.height = 0;
    this.ratio = this.fitted = 1;
    this.hovered = this.picked = -1;
    this.selecting = false; // whether dragging selects
    this.frame = null; // of the selection: x, y, x, y in pixels
    // the points go to a sheet of their own, which is moved and stretched while a hand is faster than they are
    this.sheet = document.createElement("canvas");
    this.sheetView = { x: 0, y: 0, scale: 1 };
    this.stale = true;
    this.cost = this.settle = 0;
    this.asked = false;
    this.images = new Map();
    this.#listen();
    this.points(new Float32Array(), new Uint8Array(), []);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#readColours());
    new ResizeObserver(() => this.#resize()).observe(canvas);
  }

  // the points: places x, y one after the other, and of each the number of its kind; kinds are the names of their colours
  points(xy, kindOf, kinds) {
    const n = (this.n = kindOf.length);
    [this.kindOf, this.kinds] = [kindOf, kinds];
    const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
    for (let i = 0; i < n; i++) for (const a of [0, 1]) {
      low[a] = Math.min(low[a], xy[2 * i + a]);
      high[a] = Math.max(high[a], xy[2 * i + a]);
    }
    const half = Math.max(high[0] - low[0], high[1] - low[1], 1e-9) / 2;
    [this.X, this.Y] = [new Float32Array(n), new Float32Array(n)];
    for (let i = 0; i < n; i++) {
      this.X[i] = (xy[2 * i] - (low[0] + high[0]) / 2) / half;
      this.Y[i] = -(xy[2 * i + 1] - (low[1] + high[1]) / 2) / half; // upwards is up
    }
    this.extent = [0, 1].map((a) => Math.max((high[a] - low[a]) / half || 0, 1e-3));
    const { SIDE } = PointMap;
    const at = (i) => this.#cell(this.Y[i]) * SIDE + this.#cell(this.X[i]);
    [this.starts, this.members] = [new Uint32Array(SIDE * SIDE + 1), new Uint32Array(n)];
    for (let i = 0; i < n; i++) this.starts[at(i) + 1]++;
    for (let c = 0; c < SIDE * SIDE; c++) this.starts[c + 1] += this.starts[c];
    const filled = this.starts.slice();
    for (let i = 0; i < n; i++) this.members[filled[at(i)]++] = i;
    this.images.clear();
    this.hovered = this.picked = -1;
    this.#readColours();
    if (this.width) this.fit();
  }

  #cell(v) { return Math.max(0, Math.min(PointMap.SIDE - 1, Math.floor(((v + 1) / 2) * PointMap.SIDE))); }

  left(x) { return (x - this.view.x) * this.view.scale + this.width / 2; }

  top(y) { return (y - this.view.y) * this.view.scale + this.height / 2; }

  // the points between two places of the world, and some around them
  *within(x0, y0, x1, y1) {
    const { SIDE } = PointMap;
    for (let row = this.#cell(y0); row <= this.#cell(y1); row++) {
      const last = this.starts[row * SIDE + this.#cell(x1) + 1];
      for (let at = this.starts[row * SIDE + this.#cell(x0)]; at < last; at++) yield this.members[at];
    }
  }

  *inView() {
    const { view } = this, w = this.width / view.scale / 2, h = this.height / view.scale / 2;
    for (const i of this.within(view.x - w, view.y - h, view.x + w, view.y + h)) {
      if (Math.abs(this.X[i] - view.x) <= w && Math.abs(this.Y[i] - view.y) <= h) yield i;
    }
  }

  nearest(px, py, reach) {
    const { view } = this, x = (px - this.width / 2) / view.scale + view.x, y = (py - this.height / 2) / view.scale + view.y;
    const r = reach / view.scale;
    let best = -1, least = r * r;
    for (const i of this.within(x - r, y - r, x + r, y + r)) {
      const d = (this.X[i] - x) ** 2 + (this.Y[i] - y) ** 2;
      if (d <= least && this.options.visible(i)) [best, least] = [i, d];
    }
    return best;
  }

  // --- drawing

  #readColours() {
    const style = getComputedStyle(document.documentElement);
    this.colours = this.kinds.map((name) => style.getPropertyValue(`--${name}`).trim());
    [this.ink, this.paper] = ["--ink", "--panel"].map((name) => style.getPropertyValue(name).trim());
    this.changed();
  }

  radius() {
    const base = this.n > 30000 ? 1.3 : this.n > 5000 ? 2 : this.n > 800 ? 2.8 : 4;
    return base * Math.min(2.6, Math.max(1, (this.view.scale / this.fitted) ** 0.35));
  }

  #dot(colour, r, alpha) {
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

  #drawPoints() {
    const { sheet, view, X, Y, options } = this;
    const start = performance.now(), r = this.radius() * this.ratio, c = sheet.getContext("2d");
    [sheet.width, sheet.height] = [this.canvas.width, this.canvas.height];
    Object.assign(this.sheetView, view);
    const s = view.scale * this.ratio, dx = sheet.width / 2 - view.x * s, dy = sheet.height / 2 - view.y * s;
    const alpha = this.n > 5000 ? 0.7 : 0.85;
    for (const faint of [true, false]) for (let k = 0; k < this.kinds.length; k++) {
      const sprite = this.#dot(this.colours[k], r, faint ? 0.12 : alpha), off = sprite.width / 2;
      for (let i = 0; i < this.n; i++) {
        if (this.kindOf[i] !== k || (faint ? !options.faint(i) : !options.visible(i))) continue;
        const px = X[i] * s + dx, py = Y[i] * s + dy;
        if (px > -off && py > -off && px < sheet.width + off && py < sheet.height + off) c.drawImage(sprite, px - off, py - off);
      }
    }
    this.stale = false;
    this.cost = performance.now() - start;
  }

  // pictures: as many as find room, first those in the middle of a cell; they are chosen anew at steps of the zoom only, and
  // by where they are in the world, so that they stay while one moves
  #choose() {
    const { CELL, PICTURE } = PointMap, { X, Y, options } = this;
    const level = Math.floor(3 * Math.log2(this.view.scale / CELL)), size = 2 ** (-level / 3), room = PICTURE / CELL;
    if (this.chosen && level === this.chosenFor) return;
    this.chosenFor = level;
    const off = (v) => Math.abs(v / size - Math.floor(v / size) - 0.5);
    const candidates = [];
    for (let i = 0; i < this.n; i++) if (options.visible(i) && options.picture(i)) candidates.push([Math.max(off(X[i]), off(Y[i])), i]);
    candidates.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const kept = new Map(); // cell -> items in it
    this.chosen = [];
    for (const [, i] of candidates) {
      const cx = Math.floor(X[i] / size), cy = Math.floor(Y[i] / size);
      const covered = [-1, 0, 1].some((dx) => [-1, 0, 1].some((dy) => (kept.get(`${cx + dx} ${cy + dy}`) ?? []).some(
        (other) => Math.abs(X[i] - X[other]) < room * size && Math.abs(Y[i] - Y[other]) < room * size)));
      if (covered) continue;
      this.chosen.push(i);
      kept.set(`${cx} ${cy}`, [...(kept.get(`${cx} ${cy}`) ?? []), i]);
    }
  }

  #pictureAt(px, py) {
    if (!this.options.pictures() || !this.chosen) return -1;
    const reach = PointMap.PICTURE / 2;
    return this.chosen.findLast((i) => Math.abs(this.left(this.X[i]) - px) < reach && Math.abs(this.top(this.Y[i]) - py) < reach) ?? -1;
  }

  #under(px, py) {
    const point = this.nearest(px, py, 6), covering = this.#pictureAt(px, py);
    return covering >= 0 && point !== covering ? covering : point >= 0 ? point : this.nearest(px, py, 18);
  }

  #image(i) {
    let found = this.images.get(i);
    if (!found) {
      found = new Image();
      found.onload = () => this.ask();
      found.src = this.options.picture(i);
      if (this.images.size > PointMap.KEPT) this.images.delete(this.images.keys().next().value);
    } else this.images.delete(i);
    this.images.set(i, found);
    return found;
  }

  #drawPicture(i, size, ring) {
    const img = this.#image(i), { context } = this;
    if (!img.complete || !img.naturalWidth) return;
    const shrink = Math.min(size / img.naturalWidth, size / img.naturalHeight);
    const w = img.naturalWidth * shrink, h = img.naturalHeight * shrink, x = this.left(this.X[i]) - w / 2, y = this.top(this.Y[i]) - h / 2;
    context.save();
    context.beginPath();
    context.roundRect(x, y, w, h, 5);
    context.save();
    context.clip();
    context.drawImage(img, x, y, w, h);
    context.restore();
    context.lineWidth = ring ? 3 : 1.5;
    context.strokeStyle = ring ? this.ink : this.colours[this.kindOf[i]];
    context.stroke();
    context.restore();
  }

  #drawPictures() {
    const { PICTURE } = PointMap;
    this.#choose();
    for (const i of this.chosen) {
      const x = this.left(this.X[i]), y = this.top(this.Y[i]);
      if (x > -PICTURE && y > -PICTURE && x < this.width + PICTURE && y < this.height + PICTURE) this.#drawPicture(i, PICTURE, false);
    }
  }

  #mark(i) {
    const { context } = this;
    if (this.options.pictures() && this.options.picture(i)) this.#drawPicture(i, PointMap.PICTURE * 1.25, true);
    context.beginPath();
    context.arc(this.left(this.X[i]), this.top(this.Y[i]), this.radius() + 3, 0, 2 * Math.PI);
    context.lineWidth = 2.5;
    context.strokeStyle = this.paper;
    context.stroke();
    context.lineWidth = 1.5;
    context.strokeStyle = this.ink;
    context.stroke();
  }

  #draw() {
    this.asked = false;
    const { context, sheet, sheetView } = this;
    if (this.stale && (this.cost < 24 || performance.now() >= this.settle)) this.#drawPoints();
    else if (this.stale) setTimeout(() => this.ask(), this.settle - performance.now() + 1);
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    const zoom = this.view.scale / sheetView.scale;
    const w = (sheet.width / this.ratio) * zoom, h = (sheet.height / this.ratio) * zoom;
    if (w && h) context.drawImage(sheet, this.left(sheetView.x) - w / 2, this.top(sheetView.y) - h / 2, w, h);
    if (this.options.pictures()) this.#drawPictures();
    if (this.picked >= 0) this.#mark(this.picked);
    if (this.hovered >= 0 && this.hovered !== this.picked) this.#mark(this.hovered);
    if (this.frame) {
      const [x0, y0, x1, y1] = this.frame;
      context.fillStyle = context.strokeStyle = this.ink;
      context.globalAlpha = 0.12;
      context.fillRect(x0, y0, x1 - x0, y1 - y0);
      context.globalAlpha = 1;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
    this.options.drawn?.();
  }

  // draw soon
  ask() {
    if (!this.asked) requestAnimationFrame(() => this.#draw());
    this.asked = true;
  }

  // what is visible has changed
  changed() {
    this.chosen = null;
    this.#stale();
  }

  #stale() {
    this.stale = true;
    this.settle = performance.now() + 120;
    this.ask();
  }

  // --- one point: under the pointer, or picked

  hover(i) {
    if (i === this.hovered) return;
    this.hovered = i;
    this.canvas.classList.toggle("over", i >= 0);
    this.options.hovered(i);
    this.ask();
  }

  pick(i) {
    this.picked = i;
    this.options.picked(i);
    this.ask();
  }

  // --- moving

  #moved() {
    this.#stale();
    this.options.moved();
  }

  fit() {
    this.fitted = Math.min(this.width / this.extent[0], this.height / this.extent[1]) * 0.86;
    Object.assign(this.view, { x: 0, y: 0, scale: this.fitted });
    this.#moved();
  }

  zoom(by) { this.#zoomAt(this.width / 2, this.height / 2, by); }

  #zoomAt(px, py, by) {
    const { view } = this, scale = Math.max(this.fitted * 0.4, Math.min(this.fitted * 4000, view.scale * by));
    view.x += (px - this.width / 2) * (1 / view.scale - 1 / scale);
    view.y += (py - this.height / 2) * (1 / view.scale - 1 / scale);
    view.scale = scale;
    this.#moved();
  }

  flyTo(i) {
    const { view } = this, from = { ...view }, scale = Math.max(view.scale, this.fitted * 3), start = performance.now();
    const step = () => {
      const t = this.still ? 1 : Math.min(1, (performance.now() - start) / 350), e = 1 - (1 - t) ** 3;
      view.scale = from.scale * (scale / from.scale) ** e;
      view.x = from.x + (this.X[i] - from.x) * e;
      view.y = from.y + (this.Y[i] - from.y) * e;
      this.#stale();
      if (t < 1) requestAnimationFrame(step);
    };
    step();
  }

  #listen() {
    const { canvas } = this, fingers = new Map();
    let travelled = 0;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
      travelled = 0;
      if (event.shiftKey || this.selecting) this.frame = [event.offsetX, event.offsetY, event.offsetX, event.offsetY];
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId), here = [event.offsetX, event.offsetY];
      if (!before) { this.hover(this.#under(...here)); return; }
      travelled += Math.hypot(here[0] - before[0], here[1] - before[1]);
      fingers.set(event.pointerId, here);
      if (this.frame) {
        this.frame = [...this.frame.slice(0, 2), ...here];
        this.ask();
        return;
      }
      canvas.classList.add("moving");
      if (fingers.size === 1) {
        this.view.x -= (here[0] - before[0]) / this.view.scale;
        this.view.y -= (here[1] - before[1]) / this.view.scale;
        this.#moved();
      } else {
        const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
        const apart = (at) => Math.max(1, Math.hypot(at[0] - other[0], at[1] - other[1]));
        this.#zoomAt(...other, apart(here) / apart(before));
      }
    });
    const release = (event) => {
      if (this.frame && travelled >= 4) this.#select();
      else if (event.type === "pointerup" && travelled < 4 && fingers.size === 1) this.pick(this.#under(event.offsetX, event.offsetY));
      this.frame = null;
      fingers.delete(event.pointerId);
      canvas.classList.remove("moving");
      this.ask();
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => this.hover(-1));
    canvas.addEventListener("dblclick", (event) => this.#zoomAt(event.offsetX, event.offsetY, 2));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.#zoomAt(event.offsetX, event.offsetY, Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #select() {
    const [x0, y0, x1, y1] = this.frame;
    const between = (v, a, b) => v >= Math.min(a, b) && v <= Math.max(a, b);
    this.options.selected([...this.inView()].filter((i) => this.options.visible(i) && between(this.left(this.X[i]), x0, x1) && between(this.top(this.Y[i]), y0, y1)));
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const middle = [this.width / 2, this.height / 2];
    if (step) {
      this.view.x += (step[0] * 60) / this.view.scale;
      this.view.y += (step[1] * 60) / this.view.scale;
      this.#moved();
      this.hover(this.nearest(...middle, 80));
    } else if (event.key === "+" || event.key === "=") this.zoom(1.4);
    else if (event.key === "-") this.zoom(1 / 1.4);
    else if (event.key === "0" || event.key === "Home") this.fit();
    else if (event.key === "Enter") this.pick(this.hovered >= 0 ? this.hovered : this.nearest(...middle, 1e9));
    else if (event.key === "Escape" && (this.hovered >= 0 || this.picked >= 0)) { this.hover(-1); this.pick(-1); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #resize() {
    const { canvas } = this, first = !this.width;
    [this.width, this.height, this.ratio] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio || 1];
    if (!this.width) return; // hidden
    [canvas.width, canvas.height] = [Math.round(this.width * this.ratio), Math.round(this.height * this.ratio)];
    if (first) this.fit();
    else this.#stale();
  }
}
