// The map of the collection: every item a point, similar ones near each other. Drawn by the canvas of `e5v-search map`.

import { $, h, named, number, plural, say, thumbnail } from "./dom.js";
import { ask } from "./state.js";

const KINDS = ["image", "text", "rendered"];
const SHOWN = 200; // of a selection

const numbers = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;

export class MapView {
  constructor(section, go) {
    this.section = section;
    this.go = go;
    this.ids = [];
    this.passing = null; // ids that pass the filters; null: all
    this.names = new Map();
    this.loaded = false;
    this.filters = "";
    this.map = new PointMap($("map"), {
      picture: (i) => (this.kindOf[i] === 1 ? "" : thumbnail(this.ids[i], 256)),
      visible: (i) => this.passing === null || this.passing.has(this.ids[i]),
      faint: (i) => this.passing !== null && !this.passing.has(this.ids[i]),
      hovered: (i) => this.#card(i),
      picked: (i) => { if (i >= 0) go.open({ id: this.ids[i] }); },
      selected: (found) => this.#select(found),
    });
    $("map-in").addEventListener("click", () => this.map.zoom(1.6));
    $("map-out").addEventListener("click", () => this.map.zoom(1 / 1.6));
    $("map-all").addEventListener("click", () => this.map.fit());
    $("map-select").addEventListener("click", () => {
      this.map.selecting = !this.map.selecting;
      $("map-select").setAttribute("aria-pressed", String(this.map.selecting));
    });
  }

  async show(filters, anew) {
    try {
      if (!this.loaded || anew) await this.#load();
      const key = JSON.stringify(filters);
      if (key !== this.filters || anew) {
        this.filters = key;
        this.passing = filters.length ? await this.#which(filters) : null;
        this.map.changed();
      }
    } catch (error) {
      this.loaded = false;
      say(error.message);
    }
  }

  async #load() {
    const found = await ask("/api/map");
    this.ids = Array.from(new BigInt64Array(numbers(found.ids)), Number);
    this.kindOf = new Uint8Array(numbers(found.kinds));
    this.loaded = true;
    $("map").setAttribute("aria-label", `Map of ${plural(this.ids.length, "item")}${this.ids.length < found.of ? `, drawn from ${number(found.of)}` : ""}`);
    this.map.points(new Float32Array(numbers(found.xy)), this.kindOf, KINDS);
  }

  async #which(filters) {
    const ids = new Set();
    for (let start = 0, total = 1; start < total; start += 500) {
      const found = await ask("/api/items", { where: filters, start, n: 500 });
      for (const item of found.items) ids.add(item.id);
      total = found.total;
    }
    return ids;
  }

  async #card(i) {
    const card = $("map-card");
    card.hidden = i < 0;
    if (i < 0) return;
    const id = this.ids[i], [img, label] = card.children;
    img.hidden = this.kindOf[i] === 1;
    if (!img.hidden) img.src = thumbnail(id, 256);
    label.textContent = this.names.get(id) ?? "…";
    const { map } = this, x = map.left(map.X[i]), y = map.top(map.Y[i]);
    card.style.transform = `translate(${x + 240 < map.width ? x + 44 : Math.max(8, x - 244)}px, ${Math.max(8, Math.min(y - 60, map.height - 190))}px)`;
    if (!this.names.has(id)) {
      const item = await ask(`/api/items/${id}`).catch(() => null);
      this.names.set(id, item ? named(item) : "");
      if (map.hovered === i) label.textContent = this.names.get(id);
    }
  }

  #select(found) {
    const box = $("selection"), [told, list] = box.children;
    box.hidden = !found.length;
    told.replaceChildren(plural(found.length, "item"), found.length > SHOWN ? `, ${SHOWN} of them shown` : "",
      h("button", { type: "button", className: "icon", "aria-label": "Close the selection", onclick: () => { box.hidden = true; } }, "✕"));
    list.replaceChildren(...found.slice(0, SHOWN).map((i) => h("li", {}, h("button", { type: "button", "aria-label": `Item ${this.ids[i]}`, onclick: () => this.go.open({ id: this.ids[i] }) },
      this.kindOf[i] === 1 ? h("i", {}, "¶") : h("img", { src: thumbnail(this.ids[i], 256), alt: "", loading: "lazy" })))));
  }
}
