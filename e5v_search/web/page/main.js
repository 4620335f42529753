// The page: what is asked comes from the address bar, and every action is a new address.

import { $, fileName, h, number, plural, redraw, say, thumbnail } from "./dom.js";
import { Filters } from "./filters.js";
import { Grid, told } from "./grid.js";
import { Look } from "./look.js";
import { MapView } from "./map.js";
import { address, ask, asks, parseTerm, read, Refused, search, uploads, where, writeTerm } from "./state.js";
import { Status } from "./status.js";

const FIRST = 60, STEP = 60, MOST = 1000; // results asked for
const PAGE = 100; // items of the whole collection
const SETTLED = 250; // ms without a key

let state = read();
let shown = null; // what the grid shows: {key, k, hits, total}
let running = null;
let cut = "";

const go = {
  open: (item) => to({ item: String(item.id) }),
  more: (item) => to({ q: "", modify: "", upload: "", image: String(item.id), plus: [], minus: [], item: "", view: "" }),
  change(item) {
    to({ q: "", modify: "", upload: "", image: String(item.id), item: "", view: "" });
    $("query").focus();
  },
  locate(item) {
    to({ item: "", view: "map" });
    map.locate(item);
  },
  less(item) {
    if (!asks(state)) return say("search for something first: then results can be pushed away from this one");
    return to({ minus: [...state.minus, writeTerm({ image: item.id, weight: 0.5 })], item: "", view: "" });
  },
  only: (filters) => to({ f: filters, item: "", view: "" }),
};

const grid = new Grid($("results"), go);
const filters = new Filters($("filters"), to);
const look = new Look($("look"), { ...go, close: left, items: () => grid.items });
const map = new MapView($("map-view"), go);
const status = new Status($("status"), { changed: () => update(true), only: go.only });

// who closes a photo goes on in the grid from there, however far they have turned
function left(id) {
  to({ item: "" });
  const at = grid.items.findIndex((item) => String(item.id) === id);
  if (at >= 0 && (document.activeElement === document.body || $("results").contains(document.activeElement))) grid.focus(at);
}

function to(changes, replace = false) {
  const next = { ...state, ...changes };
  const place = address(next);
  if (place !== address(state)) history[replace ? "replaceState" : "pushState"](null, "", place);
  state = next;
  update();
}

addEventListener("popstate", () => {
  state = read();
  update();
});

// --- results

function update(anew = false) {
  controls();
  filters.show(state, anew);
  look.show(state.item);
  const onMap = state.view === "map", held = document.activeElement;
  $("map-view").hidden = !onMap;
  $("show-map").setAttribute("aria-pressed", String(onMap));
  for (const id of ["results", "told", "more"]) $(id).hidden = onMap;
  $("nothing").hidden = true;
  if (!held.checkVisibility()) onMap ? $("map").focus() : grid.focus();
  if (onMap) map.show(where(state), anew);
  const { item, view, t, ...asked } = state;
  const key = JSON.stringify(asked);
  if (onMap || (!anew && shown?.key === key)) return threshold();
  return load(key, anew ? (shown?.k ?? FIRST) : FIRST);
}

async function load(key, k) {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const asked = state;
  document.body.classList.add("busy");
  try {
    if (asks(asked)) {
      const found = await search(asked, k, signal);
      shown = { key, k, hits: found.hits, more: found.hits.length === k && k < MOST, ms: found.took_ms.total };
    } else {
      const found = await ask("/api/items", { n: PAGE, where: where(asked) }, { signal });
      shown = { key, k, hits: found.items, total: found.total, more: found.items.length < found.total };
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    shown = { key, k, hits: [], more: false, error: error instanceof Refused ? error.message : "the service does not answer" };
  } finally {
    if (!signal.aborted) document.body.classList.remove("busy");
  }
  cut = "";
  threshold();
  scroll();
}

function threshold() {
  if (!shown) return;
  const scored = asks(state) && shown.hits.length > 0;
  $("cut").hidden = !scored;
  const least = state.t === "" ? -Infinity : Number(state.t);
  if (scored) {
    const scores = shown.hits.map((hit) => hit.score);
    $("threshold").max = Math.max(1, Math.ceil(scores[0] * 100) / 100);
    $("threshold").min = Math.min(-0.2, Math.floor(scores.at(-1) * 100) / 100);
    $("threshold").value = state.t === "" ? $("threshold").min : state.t;
    $("threshold-value").textContent = state.t === "" ? "any" : Number(state.t).toFixed(2);
  }
  const passing = scored ? shown.hits.filter((hit) => hit.score >= least) : shown.hits;
  const now = `${shown.key} ${shown.k} ${least} ${shown.hits.length}`;
  if (now !== cut) {
    const before = grid.items.length;
    if (cut.startsWith(`${shown.key} `) && before && passing.length > before && passing[before - 1].id === grid.items[before - 1].id) grid.append(passing.slice(before));
    else grid.show(passing);
    cut = now;
  }
  const more = shown.more && passing.length === shown.hits.length;
  $("count").textContent = shown.error ? "" : !scored && !asks(state)
    ? `${plural(shown.total ?? passing.length, "item")}, newest first`
    : `${more ? "the best " : ""}${told(passing.length, shown.ms)}`;
  $("nothing").hidden = passing.length > 0;
  if (!passing.length) nothing(least > -Infinity);
}

function nothing(isCut) {
  const filtered = where(state).length > 0;
  const line = shown.error ?? (isCut ? "Nothing scores as high as that." : filtered ? "Nothing passes these filters."
    : asks(state) ? "Nothing found." : "This collection is empty. Fill it with: e5v-search index FOLDER");
  const way = isCut ? h("button", { type: "button", onclick: () => to({ t: "" }) }, "Any score")
    : filtered ? h("button", { type: "button", onclick: () => to({ f: [], from: "", to: "" }) }, "Without filters") : null;
  redraw($("nothing"), [h("p", {}, line), way], () => $("query"));
}

// more, as one scrolls
const watcher = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) grow(); }, { rootMargin: "1200px" });
watcher.observe($("more"));
let growing = false;

function scroll() {
  if ($("more").getBoundingClientRect().top < innerHeight + 1200) grow();
}

async function grow() {
  if (growing || !shown?.more || state.view === "map" || (state.t !== "" && asks(state) && grid.items.length < shown.hits.length)) return;
  growing = true;
  const { key } = shown;
  try {
    if (asks(state)) {
      const k = Math.min(shown.k + Math.max(STEP, shown.k), MOST);
      const found = await search(state, k);
      if (shown.key === key) Object.assign(shown, { k, hits: found.hits, more: found.hits.length === k && k < MOST });
    } else {
      const found = await ask("/api/items", { n: PAGE, start: shown.hits.length, where: where(state) });
      const hits = shown.hits.concat(found.items);
      if (shown.key === key) Object.assign(shown, { hits, more: found.items.length > 0 && hits.length < found.total });
    }
  } catch (error) {
    say(error.message);
    shown.more = false;
  }
  growing = false;
  threshold();
  if (shown.more) requestAnimationFrame(scroll);
}

// --- what is asked

const hasReference = () => Boolean(state.image || state.upload);

function controls() {
  const box = $("query"), words = hasReference() ? state.modify : state.q;
  if (document.activeElement !== box || box.value.trim() !== words) box.value = words;
  box.placeholder = hasReference() ? "…and change it: at night, in the snow, with two dogs" : "Search by meaning: two dogs in the snow…";
  box.setAttribute("aria-label", hasReference() ? "Change the picture like this" : "Search");
  reference();
  terms();
  const n = state.f.length + Boolean(state.from) + Boolean(state.to);
  $("filter-count").hidden = !n;
  $("filter-count").textContent = number(n);
  const named = [hasReference() ? "a picture" : "", words].filter(Boolean).join(" → ");
  document.title = named ? `${named} – e5v-search` : "e5v-search";
}

let drawn = "", preview = "";
function reference() {
  const key = `${state.image} ${state.upload}`;
  $("reference").hidden = !hasReference();
  if (key === drawn) return;
  drawn = key;
  if (preview) URL.revokeObjectURL(preview);
  preview = "";
  if (!hasReference()) return redraw($("reference"), [], () => $("query"));
  const file = uploads.get(state.upload);
  preview = file ? URL.createObjectURL(file) : "";
  const picture = state.image
    ? h("button", { type: "button", "data-key": "look", "aria-label": "Look at the picture that is searched by", onclick: () => to({ item: state.image }) }, h("img", { src: thumbnail(state.image, 256), alt: "" }))
    : file ? h("img", { src: preview, alt: `Your picture ${fileName(file.name)}` }) : h("i", {}, "?");
  picture.addEventListener("error", () => picture.replaceWith(h("i", {}, "¶")), true);
  const drop = h("button", { type: "button", className: "drop", "data-key": "drop", "aria-label": "Search without the picture", onclick: () => to({ image: "", upload: "", modify: "", q: state.modify }) }, "✕");
  redraw($("reference"), [picture, drop], () => $("query"));
}

let termsDrawn = "";
function terms() {
  const key = JSON.stringify([state.plus, state.minus, asks(state)]);
  if (key === termsDrawn) return;
  termsDrawn = key;
  const chips = [...state.plus.map((term, i) => chip("plus", term, i)), ...state.minus.map((term, i) => chip("minus", term, i))];
  const adders = asks(state) ? [adder("plus", "+ more of…"), adder("minus", "− less of…")] : [];
  redraw($("terms"), [...chips, ...adders], () => $("terms").querySelector(".adder") ?? $("query"));
  $("terms").hidden = !chips.length && !adders.length;
}

function chip(sign, term, i) {
  const { image, text, weight } = parseTerm(term);
  const name = text ?? `picture ${image}`;
  const value = h("output", {}, weight.toFixed(1));
  const change = (weight) => state[sign].with(i, writeTerm({ image, text, weight }));
  const slider = h("input", {
    type: "range", "data-key": `weight ${sign} ${i}`, min: "0.1", max: "2", step: "0.1", value: String(weight), "aria-label": `Weight of ${name}`,
    oninput: () => { value.textContent = Number(slider.value).toFixed(1); },
    onchange: () => to({ [sign]: change(Number(slider.value)) }, true),
  });
  return h("span", { className: `chip ${sign}` },
    h("b", { "aria-label": sign === "plus" ? "more of" : "less of" }, sign === "plus" ? "+" : "−"),
    image ? h("img", { src: thumbnail(image, 256), alt: `picture ${image}` }) : h("span", {}, text), slider, value,
    h("button", { type: "button", "data-key": `remove ${sign} ${i}`, "aria-label": `Remove ${name}`, onclick: () => to({ [sign]: state[sign].toSpliced(i, 1) }) }, "✕"));
}

function adder(sign, label) {
  const add = () => { if (input.value.trim()) to({ [sign]: [...state[sign], writeTerm({ text: input.value.trim(), weight: 1 })] }); };
  const input = h("input", { type: "text", className: `adder ${sign}`, "data-key": `add ${sign}`, placeholder: label, "aria-label": sign === "plus" ? "More of" : "Less of", autocomplete: "off", onchange: add });
  return input;
}

let timer = 0, typing = false;
function typed(now) {
  clearTimeout(timer);
  const act = () => {
    const text = $("query").value.trim();
    const name = hasReference() ? "modify" : "q";
    if (text === state[name]) return;
    to({ [name]: text, view: "", ...(text && !state[name] ? { t: "" } : {}) }, typing);
    typing = true; // until the box is left, one entry of the history is enough
  };
  if (now) act(); else timer = setTimeout(act, SETTLED);
}
$("query").addEventListener("input", () => typed(false));
$("query").addEventListener("blur", () => { typing = false; });
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  typed(true);
  typing = false;
});
$("threshold").addEventListener("input", () => to({ t: $("threshold").value === $("threshold").min ? "" : $("threshold").value }, true));
$("home").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  to(read("?"));
  scrollTo(0, 0);
});

// --- a picture of one's own

function by(file) {
  if (!file) return;
  if (!file.type.startsWith("image/") && !/\.(heic|heif|avif|tiff?|webp|jpe?g|png|gif|bmp)$/i.test(file.name)) {
    say(`${file.name || "this"} is no picture`);
    return;
  }
  const name = `${uploads.size + 1}-${Date.now().toString(36)}`;
  uploads.set(name, file);
  to({ q: "", modify: "", image: "", upload: name, plus: [], minus: [], item: "", view: "" });
}

$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  by($("file").files[0]);
  $("file").value = "";
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])][0];
  if (file) { event.preventDefault(); by(file); }
});
const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
let over = 0;
addEventListener("dragenter", (event) => { if (carries(event)) { over++; document.body.classList.add("dropping"); } });
addEventListener("dragleave", (event) => { if (carries(event) && --over <= 0) { over = 0; document.body.classList.remove("dropping"); } });
addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  over = 0;
  document.body.classList.remove("dropping");
  if (!carries(event)) return;
  event.preventDefault();
  by(event.dataTransfer.files[0]);
});

// --- the bar and the keys

$("show-filters").addEventListener("click", () => filters.toggle(state));
$("show-map").addEventListener("click", () => to({ view: state.view === "map" ? "" : "map" }));
$("show-status").addEventListener("click", () => status.open());
$("show-help").addEventListener("click", () => $("help").showModal());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog || event.target.closest(".close")) dialog.close(); });
}

addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input:not([type=range],[type=checkbox]), textarea")) {
    if (event.key === "Escape") event.target.blur();
    else if (event.key === "ArrowDown" && event.target === $("query")) grid.focus();
    else return;
    event.preventDefault();
    return;
  }
  if (event.key === "/") { $("query").focus(); $("query").select(); }
  else if (event.key === "f") filters.toggle(state);
  else if (event.key === "g") {
    $("show-map").click();
    if (state.view === "map") $("map").focus();
  }
  else if (event.key === "s") status.open();
  else if (event.key === "?") $("help").showModal();
  else if (event.key === "Escape" && state.view === "map") map.leave() || to({ view: "" });
  else if (event.key.startsWith("Arrow") && state.view !== "map" && [document.body, $("results")].includes(event.target)) grid.focus();
  else return;
  event.preventDefault();
});

update();
status.listen();
