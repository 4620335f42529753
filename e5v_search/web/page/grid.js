// Results as a justified grid: every row as wide as the window, every photo whole.

import { $, ICONS, day, h, icon, named, number, thumbnail } from "./dom.js";

export class Grid {
  constructor(list, actions) {
    this.list = list;
    this.actions = actions; // open, more, change, less: each with an item
    this.items = [];
    this.tiles = [];
    this.width = 0;
    this.current = 0;
    new ResizeObserver(() => { if (Math.floor(list.getBoundingClientRect().width) !== this.width) this.layout(); }).observe(list);
    list.addEventListener("keydown", (event) => this.#key(event));
    list.addEventListener("focusin", (event) => {
      const at = this.tiles.indexOf(event.target.closest("li"));
      if (at >= 0) this.#roam(at);
    });
  }

  show(items) {
    const inside = this.list.contains(document.activeElement), held = inside ? this.tiles[this.current] : null;
    const kept = new Map(this.items.map((item, i) => [`${item.id} ${item.score}`, this.tiles[i]]));
    this.items = items;
    this.tiles = items.map((item) => kept.get(`${item.id} ${item.score}`) ?? this.#tile(item));
    held?.querySelector(".tile").setAttribute("tabindex", "-1");
    this.list.replaceChildren(...this.tiles);
    this.current = 0;
    this.#roam(Math.max(0, this.tiles.indexOf(held)));
    this.layout();
    if (inside) this.focus(); // who walks by keys goes on where they were, or at the best of what is new
  }

  append(items) {
    const tiles = items.map((item) => this.#tile(item));
    this.items = this.items.concat(items);
    this.tiles = this.tiles.concat(tiles);
    this.list.append(...tiles);
    this.layout();
  }

  layout() {
    const width = Math.floor(this.list.getBoundingClientRect().width);
    this.width = width;
    if (!width) return;
    const gap = parseFloat(getComputedStyle(this.list).columnGap);
    const wanted = width < 560 ? 130 : width < 1100 ? 190 : 230;
    let row = [], sum = 0;
    const place = (last) => {
      const room = width - gap * (row.length - 1);
      const height = Math.round(last ? Math.min(wanted, room / sum) : room / sum);
      let left = room;
      row.forEach(([tile, aspect], i) => {
        const w = !last && i === row.length - 1 ? left : Math.min(left, Math.floor(height * aspect));
        left -= w;
        tile.style.width = `${w}px`;
        tile.style.height = `${height}px`;
      });
      [row, sum] = [[], 0];
    };
    this.tiles.forEach((tile, i) => {
      const aspect = shape(this.items[i]);
      row.push([tile, aspect]);
      sum += aspect;
      if (sum * wanted + gap * (row.length - 1) >= width) place(false);
    });
    if (row.length) place(true);
  }

  // without any item, the list waits for some
  focus(at = this.current) { (this.tiles.length ? this.tiles[at]?.querySelector(".tile") : this.list)?.focus(); }

  #roam(at) {
    this.tiles[this.current]?.querySelector(".tile").setAttribute("tabindex", "-1");
    this.current = at;
    this.tiles[at]?.querySelector(".tile").setAttribute("tabindex", "0");
  }

  #tile(item) {
    const { open, more, change, less } = this.actions;
    const name = named(item);
    const score = item.score === undefined ? "" : item.score.toFixed(3);
    const label = [item.kind === "image" ? "" : item.kind === "text" ? "text" : "rendered text", name,
      score && `score ${score}`, item.taken_at && day(item.taken_at)].filter(Boolean).join(", ");
    const seen = item.kind === "text"
      ? h("q", {}, item.text)
      : h("img", { loading: "lazy", decoding: "async", src: thumbnail(item.id, 512), alt: "", draggable: false });
    seen.addEventListener("error", () => seen.replaceWith(h("i", {}, name)));
    const button = (path, what, act) => h("button", { type: "button", tabIndex: -1, title: what, "aria-label": `${what}: ${name}`, onclick: () => act(item) }, icon(path));
    return h("li", { className: item.kind, draggable: false },
      h("button", { type: "button", className: "tile", tabIndex: -1, "aria-label": label, onclick: () => open(item) }, seen),
      score && h("span", { className: "score", "aria-hidden": "true" }, score),
      h("span", { className: "acts" },
        button(ICONS.more, "More like this", more),
        item.kind === "text" ? null : button(ICONS.change, "Change this…", change),
        button(ICONS.less, "Less like this", less)));
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.classList.contains("tile")) return;
    const item = this.items[this.current];
    const act = { m: this.actions.more, c: item.kind === "text" ? null : this.actions.change, l: this.actions.less }[event.key];
    if (act) act(item);
    else if (event.key === "ArrowRight") this.focus(this.current + 1);
    else if (event.key === "ArrowLeft") this.focus(this.current - 1);
    else if (event.key === "ArrowDown") this.#vertical(1);
    else if (event.key === "ArrowUp") this.#vertical(-1);
    else if (event.key === "Home") this.focus(0);
    else if (event.key === "End") this.focus(this.tiles.length - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // the nearest tile of the next row
  #vertical(direction) {
    const here = this.tiles[this.current], middle = here.offsetLeft + here.offsetWidth / 2;
    let best = -1, least = Infinity, row = null;
    for (let i = this.current + direction; i >= 0 && i < this.tiles.length; i += direction) {
      const tile = this.tiles[i];
      if (tile.offsetTop === here.offsetTop) continue;
      row ??= tile.offsetTop;
      if (tile.offsetTop !== row) break;
      const away = Math.abs(tile.offsetLeft + tile.offsetWidth / 2 - middle);
      if (away < least) [best, least] = [i, away];
    }
    if (best >= 0) this.focus(best);
  }
}

function shape(item) {
  if (item.kind === "rendered") return 2;
  if (item.kind === "text" || !item.width || !item.height) return 1.45;
  return Math.max(0.4, Math.min(3, item.width / item.height));
}

export const told = (n, ms) => `${number(n)} ${n === 1 ? "result" : "results"}${ms === undefined ? "" : ` in ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`}`;
export const count = $("count");
