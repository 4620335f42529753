// What the collection consists of, to narrow it by: kinds, dates, folders, cameras, formats, places; each with its count.

import { $, h, number, plural, redraw, say } from "./dom.js";
import { ask, where } from "./state.js";
import { world } from "./world.js";

const KINDS = { image: "photos", text: "texts", rendered: "rendered texts" };
const LISTED = 12;
// of the service's facets the names that filters have
const NAMES = { kind: "kind", taken: "taken", folder: "folder", camera: "camera", place: "near", format: "format" };

const month = (value) => new Date(`${value}-15`).toLocaleDateString("en", { month: "long" });
const degrees = ({ lat, lon }) => `${Math.abs(lat).toFixed(1)}° ${lat < 0 ? "S" : "N"}, ${Math.abs(lon).toFixed(1)}° ${lon < 0 ? "W" : "E"}`;

function* all(values) {
  for (const value of values) { yield value; yield* all(value.below); }
}

export class Filters {
  constructor(panel, to) {
    this.panel = panel;
    this.to = to;
    this.asked = "";
    this.opened = new Set(["kind", "taken"]);
    this.unfolded = new Set();
  }

  toggle(state) {
    const open = this.panel.hidden, held = this.panel.contains(document.activeElement);
    this.panel.hidden = !open;
    $("show-filters").setAttribute("aria-expanded", String(open));
    document.body.classList.toggle("filtering", open);
    if (held) $("show-filters").focus();
    if (!open) return;
    this.asked = "";
    this.show(state).then(() => this.panel.querySelector("button, input")?.focus({ preventScroll: true }));
  }

  async show(state, anew = false) {
    this.state = state;
    if (this.panel.hidden) return;
    const key = JSON.stringify(where(state));
    const typing = document.activeElement.type === "date"; // a half of a date would be lost
    if (key === this.asked && (!anew || typing)) return;
    this.asked = key;
    // each fact is counted as if nothing of it were chosen: so many there will be when one more of its values is
    const names = Object.keys(NAMES).filter((name) => where(state).length > where(state, NAMES[name]).length);
    const counted = (filters) => ask("/api/facets", { where: filters });
    try {
      const [whole, now, ...without] = await Promise.all([counted([]), counted(where(state)), ...names.map((name) => counted(where(state, NAMES[name])))]);
      if (key !== this.asked) return;
      this.#draw(whole, now, Object.fromEntries(names.map((name, i) => [name, without[i]])));
    } catch (error) {
      say(error.message);
    }
  }

  #draw(whole, now, without) {
    const groups = Object.fromEntries(Object.keys(NAMES).map((name) => [name, this.#values(name, whole, without[name] ?? now)]));
    const again = () => this.#draw(whole, now, without);
    const flip = (value) => {
      // a year is its months: of what holds another only one is chosen
      const related = new Set([...above(value), ...all(value.below)].map((each) => each.where));
      const others = this.state.f.filter((each) => each !== value.where && !related.has(each));
      this.to({ f: value.chosen ? others : [...others, value.where] });
    };
    const clear = where(this.state).length ? h("button", { type: "button", className: "clear", "data-key": "clear", onclick: () => this.to({ f: [], from: "", to: "" }) }, "Clear all") : null;
    redraw(this.panel, [
      h("header", {}, h("h2", {}, "Filters"), clear, h("button", { type: "button", className: "icon", "data-key": "close", "aria-label": "Close the filters", onclick: () => this.toggle(this.state) }, "✕")),
      h("p", { role: "status" }, plural(now.total, "item")),
      groups.kind.length > 1 ? this.#group("kind", "Kind", groups.kind, flip, again) : null,
      this.#group("taken", "Date", groups.taken, flip, again, this.#dates()),
      this.#group("folder", "Folder", groups.folder, flip, again),
      this.#group("camera", "Camera", groups.camera, flip, again),
      this.#group("place", "Place", groups.place, flip, again, groups.place.length ? h("li", {}, world(groups.place, (place) => place.chosen, flip)) : null),
      groups.format.length > 1 ? this.#group("format", "Format", groups.format, flip, again) : null,
    ], () => this.panel.querySelector("button"));
  }

  // the values of a fact as a forest: months below their year, folders below the folder that holds them
  #values(name, whole, counted) {
    const counts = new Map(counted[name].flatMap((facet) => [facet, ...(facet.months ?? [])]).map((facet) => [facet.where, facet.count]));
    const made = (facet, label, parent = null) => {
      const value = { ...facet, label, parent, below: [], count: counts.get(facet.where) ?? 0, chosen: this.state.f.includes(facet.where) };
      parent?.below.push(value);
      return value;
    };
    if (name === "taken") return whole.taken.map((year) => {
      const value = made(year, year.value);
      for (const facet of year.months) made(facet, month(facet.value), value);
      return value;
    });
    if (name !== "folder") return whole[name].map((facet) => made(facet, name === "kind" ? KINDS[facet.value] : name === "place" ? degrees(facet) : facet.value));
    const found = new Map();
    for (const facet of whole.folder.toSorted((a, b) => a.value.length - b.value.length)) {
      let parent = null;
      for (let end = facet.value.length - 1; !parent && end > 0; end--) {
        if (/[\\/]/.test(facet.value.slice(end - 1, end + 1))) parent = found.get(facet.value.slice(0, end));
      }
      found.set(facet.value, made(facet, parent ? facet.value.slice(parent.value.length).replace(/^[\\/]/, "") : facet.value, parent));
    }
    for (const value of found.values()) value.below.sort((a, b) => a.value.localeCompare(b.value, "en", { numeric: true }));
    return [...found.values()].filter((value) => !value.parent);
  }

  #group(name, title, values, flip, again, first = null) {
    if (!values.length && !first) return null;
    const chosen = [...all(values)].some((value) => value.chosen);
    const entry = (value, alone) => {
      const open = value.below.length && (alone || value.chosen || [...all(value.below)].some((each) => each.chosen));
      return h("li", {}, h("button", {
        type: "button", "data-key": value.where, "aria-pressed": String(value.chosen), className: value.count ? "" : "none", title: name === "folder" ? value.value : "", onclick: () => flip(value),
      }, h("span", {}, value.label), h("b", {}, number(value.count))), open ? listed(value.below, `${name} ${value.where}`) : null);
    };
    const listed = (entries, key, top = false) => {
      const short = !this.unfolded.has(key) && entries.length > LISTED + 2 && !entries.slice(LISTED).some((value) => [value, ...all(value.below)].some((each) => each.chosen));
      const rest = () => {
        this.unfolded.add(key);
        again();
        [...this.panel.querySelectorAll("[data-key]")].find((each) => each.dataset.key === entries[LISTED].where)?.focus();
      };
      return h("ul", {}, top ? first : null, ...(short ? entries.slice(0, LISTED) : entries).map((value) => entry(value, entries.length === 1)),
        short ? h("li", {}, h("button", { type: "button", className: "rest", "data-key": `rest ${key}`, onclick: rest }, `and ${plural(entries.length - LISTED, "other")}`)) : null);
    };
    return h("details", { open: this.opened.has(name) || chosen, ontoggle: (event) => { this.opened[event.target.open ? "add" : "delete"](name); } },
      h("summary", { "data-key": `open ${name}` }, title), listed(values, name, true));
  }

  #dates() {
    // while a year is typed it is one of the first century
    const input = (name, label) => h("label", {}, label, h("input", {
      type: "date", "data-key": name, min: "1800-01-01", max: "9999-12-31", value: this.state[name], onchange: (event) => { if (event.target.validity.valid) this.to({ [name]: event.target.value }); },
    }));
    return h("li", { className: "dates" }, input("from", "from"), input("to", "to"));
  }
}

function* above(value) {
  for (let each = value.parent; each; each = each.parent) yield each;
}
