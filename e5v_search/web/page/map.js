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
    this.loading = null;
    this.filters = "";
    this.map = new PointMap($("map"), {
      picture: (i) => (this.kindOf[i] === 1 ? "" : thumbnail(this.ids[i], 256)),
      visible: (i) => this.passing === null || this.passing.has(this.ids[i]),
      faint: (i) => this.passing !== null && !this.passing.has(this.ids[i]),
      hovered: () => this.#card(),
      drawn: () => this.#place(),
      picked: (i) => {
        this.#card();
        if (i >= 0) go.open({ id: this.ids[i] });
      },
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
      if (!this.loading || anew) this.loading = this.#load();
      await this.loading;
      const key = JSON.stringify(filters);
      if (key !== this.filters || anew) {
        this.filters = key;
        const passing = filters.length ? await this.#which(filters) : null;
        if (key !== this.filters) return;
        this.passing = passing;
        this.#label();
        this.map.changed();
      }
    } catch (error) {
      this.loading = null;
      say(error.message);
    }
  }

  // fly to an item, with its picture and name
  async locate({ id }) {
    await this.loading.catch(() => {}); // it was said
    while (!this.map.width && !this.section.hidden) await new Promise(requestAnimationFrame);
    const i = this.ids.indexOf(id);
    if (i < 0) return say(`this item is not among the ${number(this.ids.length)} that the map shows`);
    $("map").focus();
    this.map.flyTo(i);
    this.map.picked = i;
    return this.#card();
  }

  // whether there was anything to close
  leave() {
    const open = !$("selection").hidden;
    if (open) this.#select([]);
    return open;
  }

  async #load() {
    const found = await ask("/api/map");
    this.ids = Array.from(new BigInt64Array(numbers(found.ids)), Number);
    this.kindOf = new Uint8Array(numbers(found.kinds));
    this.of = found.of;
    this.#label();
    const view = this.map.n ? { ...this.map.view } : {};
    this.map.points(new Float32Array(numbers(found.xy)), this.kindOf, KINDS);
    Object.assign(this.map.view, view); // who looks at a part goes on with it
    this.#card();
  }

  #label() {
    const drawn = this.ids.length < this.of ? `, drawn from ${number(this.of)}` : "";
    const passing = this.passing ? `; ${number(this.ids.filter((id) => this.passing.has(id)).length)} pass the filters` : "";
    $("map").setAttribute("aria-label", `Map of ${plural(this.ids.length, "item")}${drawn}${passing}`);
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

  async #card() {
    const card = $("map-card"), i = this.#carded();
    card.hidden = i < 0;
    if (i < 0) return;
    const id = this.ids[i], [img, label] = card.children;
    img.hidden = this.kindOf[i] === 1;
    if (!img.hidden) img.src = thumbnail(id, 256);
    label.textContent = this.names.get(id) ?? "…";
    this.#place();
    if (!this.names.has(id)) {
      const item = await ask(`/api/items/${id}`).catch(() => null);
      this.names.set(id, item ? named(item) : "");
      if (this.#carded() === i) label.textContent = this.names.get(id);
    }
  }

  // what is pointed at, or else was picked last
  #carded() { return this.map.hovered < 0 ? this.map.picked : this.map.hovered; }

  // the card beside its point
  #place() {
    const { map } = this, i = map ? this.#carded() : -1;
    if (i < 0) return;
    const x = map.left(map.X[i]), y = map.top(map.Y[i]);
    $("map-card").style.transform = `translate(${x + 260 < map.width ? x + 48 : Math.max(8, x - 248)}px, ${Math.max(8, Math.min(y - 60, map.height - 190))}px)`;
  }

  #select(found) {
    const box = $("selection"), [told, list] = box.children, held = box.contains(document.activeElement);
    box.hidden = !found.length;
    if (held) $("map").focus();
    told.replaceChildren(plural(found.length, "item"), found.length > SHOWN ? `, ${SHOWN} of them shown` : "",
      h("button", { type: "button", className: "icon", "aria-label": "Close the selection", onclick: () => this.#select([]) }, "✕"));
    const shown = found.slice(0, SHOWN).map((i) => ({ id: this.ids[i], isText: this.kindOf[i] === 1 }));
    list.replaceChildren(...shown.map(({ id, isText }) => h("li", {}, h("button", { type: "button", "aria-label": `Item ${id}`, onclick: () => this.go.open({ id }) },
      isText ? h("i", {}, "¶") : h("img", { src: thumbnail(id, 256), alt: "", loading: "lazy" })))));
  }
}
