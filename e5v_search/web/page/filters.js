// What the collection consists of, to narrow it by: kinds, dates, folders, cameras, formats, places; each with its count.

import { $, h, number, plural, say } from "./dom.js";
import { ask, where } from "./state.js";

const KINDS = { image: "photos", text: "texts", rendered: "rendered texts" };
const LISTED = 12;

export class Filters {
  constructor(panel, to) {
    this.panel = panel;
    this.to = to;
    this.whole = null; // the facets of the whole collection
    this.asked = "";
    this.opened = new Set(["kind", "taken"]);
    this.unfolded = new Set();
  }

  toggle(state) {
    const open = this.panel.hidden;
    this.panel.hidden = !open;
    $("show-filters").setAttribute("aria-expanded", String(open));
    document.body.classList.toggle("filtering", open);
    if (!open) return;
    this.asked = "";
    this.show(state).then(() => this.panel.querySelector("button, input")?.focus({ preventScroll: true }));
  }

  async show(state) {
    if (this.panel.hidden) return;
    const filters = where(state), key = JSON.stringify(filters);
    if (key === this.asked) return;
    this.asked = key;
    try {
      const [whole, now] = await Promise.all([ask("/api/facets"), filters.length ? ask("/api/facets", { where: filters }) : null]);
      if (key === this.asked) this.#draw(state, whole, now ?? whole);
    } catch (error) {
      say(error.message);
    }
  }

  #draw(state, whole, now) {
    const focused = this.panel.contains(document.activeElement) ? document.activeElement.dataset.where : null;
    const chosen = new Set(state.f);
    const flip = (filter) => this.to({ f: chosen.has(filter) ? state.f.filter((each) => each !== filter) : [...state.f, filter] });
    const left = (name) => new Map(now[name].map((facet) => [facet.where, facet.count]));
    const groupChosen = (name) => state.f.some((each) => each.startsWith(name));
    const entry = (facet, counts, label, inner) => {
      // of values of which one is chosen already, the others could be added: they keep their counts
      const count = groupChosen(facet.where.match(/^\w+/)[0]) ? facet.count : (counts.get(facet.where) ?? 0);
      return h("li", {}, h("button", {
        type: "button", "data-where": facet.where, "aria-pressed": String(chosen.has(facet.where)), className: count ? "" : "none", onclick: () => flip(facet.where),
      }, h("span", {}, label), h("b", {}, number(count))), inner);
    };
    const group = (name, title, entries) => {
      if (!entries.length) return null;
      const all = this.unfolded.has(name) || entries.length <= LISTED + 2;
      const rest = entries.length - LISTED;
      return h("details", { open: this.opened.has(name) || groupChosen(name === "place" ? "near" : name), ontoggle: (event) => { this.opened[event.target.open ? "add" : "delete"](name); } },
        h("summary", {}, title), h("ul", {}, ...(all ? entries : entries.slice(0, LISTED))),
        all ? null : h("button", { type: "button", className: "rest", onclick: () => { this.unfolded.add(name); this.#draw(state, whole, now); } }, `and ${plural(rest, "other")}`));
    };
    const months = left("taken");
    for (const year of now.taken) for (const month of year.months) months.set(month.where, month.count);
    const root = whole.folder[0]?.value ?? "";
    const depth = (path) => path.slice(root.length).split(/[\\/]/).filter(Boolean).length;
    const parts = [
      group("kind", "Kind", whole.kind.length > 1 ? whole.kind.map((facet) => entry(facet, left("kind"), KINDS[facet.value] ?? facet.value)) : []),
      group("taken", "Date", [this.#dates(state), ...whole.taken.map((year) => entry(year, left("taken"), year.value, this.#months(year, months, entry, chosen)))]),
      group("folder", "Folder", whole.folder.map((facet) => {
        const made = entry(facet, left("folder"), depth(facet.value) ? facet.value.split(/[\\/]/).pop() : facet.value);
        made.dataset.depth = Math.min(depth(facet.value), 5);
        made.firstChild.title = facet.value;
        return made;
      })),
      group("camera", "Camera", whole.camera.map((facet) => entry(facet, left("camera"), facet.value))),
      whole.place.length ? this.#places(whole.place, left("place"), chosen, flip, groupChosen("near")) : null,
      group("format", "Format", whole.format.length > 1 ? whole.format.map((facet) => entry(facet, left("format"), facet.value)) : []),
    ];
    const clear = where(state).length ? h("button", { type: "button", className: "clear", onclick: () => this.to({ f: [], from: "", to: "" }) }, "Clear all") : null;
    this.panel.replaceChildren(
      h("header", {}, h("h2", {}, "Filters"), clear, h("button", { type: "button", className: "icon", "aria-label": "Close the filters", onclick: () => this.toggle(state) }, "✕")),
      h("p", { role: "status" }, plural(now.total, "item")), ...parts.filter(Boolean));
    if (focused) [...this.panel.querySelectorAll("[data-where]")].find((each) => each.dataset.where === focused)?.focus({ preventScroll: true });
  }

  #dates(state) {
    const input = (name, label) => h("label", {}, label, h("input", { type: "date", value: state[name], onchange: (event) => this.to({ [name]: event.target.value }) }));
    return h("li", { className: "dates" }, input("from", "from"), input("to", "to"));
  }

  #months(year, counts, entry, chosen) {
    const open = chosen.has(year.where) || year.months.some((month) => chosen.has(month.where));
    if (!open) return null;
    const name = (value) => new Date(`${value}-15`).toLocaleDateString("en", { month: "long" });
    return h("ul", { className: "months" }, ...year.months.map((month) => entry(month, counts, name(month.value))));
  }

  #places(places, counts, chosen, flip, any) {
    const canvas = h("canvas", { className: "world", width: 560, height: 280, role: "img", "aria-label": `${plural(places.length, "place")} on a map of the world; they are listed below` });
    const most = Math.max(...places.map((place) => place.count));
    const at = ({ lat, lon }) => [((lon + 180) / 360) * 560, ((90 - lat) / 180) * 280];
    const draw = () => {
      const style = getComputedStyle(document.documentElement), c = canvas.getContext("2d");
      const [line, accent, ink] = ["--line", "--accent", "--ink"].map((name) => style.getPropertyValue(name).trim());
      c.clearRect(0, 0, 560, 280);
      c.strokeStyle = line;
      c.lineWidth = 1;
      for (let lon = -180; lon <= 180; lon += 30) c.strokeRect(((lon + 180) / 360) * 560, 0, 0, 280);
      for (let lat = -90; lat <= 90; lat += 30) c.strokeRect(0, ((90 - lat) / 180) * 280, 560, 0);
      for (const place of places) {
        const [x, y] = at(place);
        c.beginPath();
        c.arc(x, y, 4 + 8 * Math.sqrt(place.count / most), 0, 2 * Math.PI);
        c.fillStyle = chosen.has(place.where) ? ink : accent;
        c.globalAlpha = 0.75;
        c.fill();
      }
    };
    canvas.addEventListener("click", (event) => {
      const scale = 560 / canvas.clientWidth, x = event.offsetX * scale, y = event.offsetY * scale;
      const away = (place) => Math.hypot(at(place)[0] - x, at(place)[1] - y);
      const nearest = places.reduce((a, b) => (away(a) < away(b) ? a : b));
      if (away(nearest) < 30) flip(nearest.where);
    });
    draw();
    const named = ({ lat, lon }) => `${Math.abs(lat).toFixed(1)}° ${lat < 0 ? "S" : "N"}, ${Math.abs(lon).toFixed(1)}° ${lon < 0 ? "W" : "E"}`;
    const listed = places.slice(0, 8).map((place) => {
      const count = any ? place.count : (counts.get(place.where) ?? 0);
      return h("li", {}, h("button", { type: "button", "data-where": place.where, "aria-pressed": String(chosen.has(place.where)), className: count ? "" : "none", onclick: () => flip(place.where) }, h("span", {}, named(place)), h("b", {}, number(count))));
    });
    return h("details", { open: this.opened.has("place") || any, ontoggle: (event) => { this.opened[event.target.open ? "add" : "delete"]("place"); } },
      h("summary", {}, "Place"), canvas, h("ul", {}, ...listed));
  }
}
