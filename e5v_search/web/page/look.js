// One item large: its facts, the words that the model sees in it, photos that show the same.

import { ICONS, broken, bytes, day, fileName, folderOf, h, icon, named, redraw, say, thumbnail } from "./dom.js";
import { ask } from "./state.js";

export class Look {
  constructor(dialog, actions) {
    this.dialog = dialog;
    this.actions = actions; // more, change, less, locate: with an item; close: with an id; items: those that the grid shows
    this.id = "";
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault(); // "close" comes later, when another may be open already
      this.#leave();
    });
    dialog.addEventListener("close", () => { if (!dialog.open) this.#leave(); });
    dialog.addEventListener("keydown", (event) => this.#key(event));
  }

  async show(id) {
    if (id === this.id) return;
    this.id = id;
    if (!id) return this.dialog.close();
    const known = this.actions.items().find((item) => String(item.id) === id);
    if (!this.dialog.open) this.dialog.showModal();
    if (known) this.#draw(known);
    try {
      const item = await ask(`/api/items/${encodeURIComponent(id)}`);
      if (this.id !== id) return;
      this.#draw({ ...known, ...item }, item);
      await Promise.all([this.#words(id), item.kind === "image" ? this.#copies(id) : null]);
    } catch (error) {
      if (this.id !== id) return;
      say(error.message);
      if (!known) this.dialog.close();
    }
  }

  #leave() {
    const { id } = this;
    this.id = "";
    this.dialog.close();
    if (id) this.actions.close(id);
  }

  #draw(item, facts) {
    const { more, change, less, locate } = this.actions;
    const name = named(item);
    this.item = item;
    const act = (what, label, path, go) => h("button", { type: "button", "data-key": what, onclick: () => go(item) }, icon(path), label);
    const plain = (what, label, path, go) => h("button", { type: "button", className: "icon", "data-key": what, "aria-label": label, title: label, onclick: go }, icon(path));
    const shown = item.kind === "text" ? h("blockquote", {}, item.text) : this.#picture(item, name);
    const [before, after] = [-1, 1].map((step) => this.#beside(step));
    redraw(this.dialog, [
      h("div", { className: "seen" }, shown,
        before ? plain("before", "Previous", ICONS.left, () => this.#turn(-1)) : null,
        after ? plain("after", "Next", ICONS.right, () => this.#turn(1)) : null),
      h("div", { className: "known" },
        h("header", {}, h("h2", {}, item.kind === "image" ? name : item.kind === "text" ? "Text" : "Rendered text"), plain("close", "Close (Esc)", ICONS.close, () => this.#leave())),
        h("div", { className: "does" },
          act("more", "More like this", ICONS.more, more),
          item.kind === "text" ? null : act("change", "Change this…", ICONS.change, change),
          act("less", "Less like this", ICONS.less, less),
          act("locate", "On the map", ICONS.map, locate)),
        facts ? this.#facts(item) : null,
        h("section", { id: "words", hidden: true }), h("section", { id: "copies", hidden: true })),
    ], () => this.dialog.querySelector('[data-key="close"]'));
  }

  #picture(item, name) {
    const img = h("img", { alt: item.kind === "rendered" ? item.text : name, src: thumbnail(item.id, 512) });
    const large = new Image(); // the small one is there at once; the large one takes its place
    large.onload = () => { img.src = large.src; };
    large.src = thumbnail(item.id, 2048);
    img.addEventListener("error", () => img.replaceWith(h("p", { className: "missing" }, "This picture cannot be read now: its file is gone, or its disk is away.")));
    if (item.width && item.height) [img.width, img.height] = [item.width, item.height];
    return img;
  }

  #facts(item) {
    const rows = [
      ["score", item.score === undefined ? "" : item.score.toFixed(4)],
      ["taken", item.taken_at ? `${day(item.taken_at)}, ${item.taken_at.slice(11, 16)}` : ""],
      ["camera", item.camera],
      ["size", [item.width && `${item.width} × ${item.height}`, item.format, item.bytes && bytes(item.bytes)].filter(Boolean).join(" · ")],
      ["place", item.lat === null ? "" : `${item.lat.toFixed(4)}, ${item.lon.toFixed(4)}`],
      ["file", item.path ? fileName(item.path) + (item.part === null ? "" : `, ${item.part}`) : ""],
      ["folder", item.path ? broken(folderOf(item.path)) : ""],
      ["text", item.kind === "rendered" ? item.text : ""],
      ...Object.entries(item.facts).map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : String(value)]),
    ];
    const whole = item.kind === "image" && item.available
      ? h("a", { href: `/api/items/${item.id}/image`, target: "_blank", rel: "noopener" }, "Open the file itself") : null;
    return h("div", {}, h("dl", {}, ...rows.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, ...[value].flat())))),
      item.available === false ? h("p", { className: "missing" }, "The file is not where it was.") : null, whole);
  }

  async #words(id) {
    const found = await ask(`/api/items/${id}/words`, { k: 8 });
    const section = this.dialog.querySelector("#words");
    if (this.id !== id || !section) return;
    section.hidden = !found.words.length;
    section.replaceChildren(h("h3", {}, "In the model’s words"), h("p", { className: "words" }, ...found.words.map((word) => h("span", { title: word.score.toFixed(3) }, word.text))));
  }

  async #copies(id) {
    const found = await ask(`/api/items/${id}/copies`);
    const section = this.dialog.querySelector("#copies");
    if (this.id !== id || !section) return;
    section.hidden = !found.items.length;
    section.replaceChildren(h("h3", {}, "The same picture"), h("ul", {}, ...found.items.map((item) => h("li", {},
      h("button", { type: "button", title: item.path, "aria-label": `${fileName(item.path)}, ${item.exact ? "the same bytes" : "saved again"}`, onclick: () => this.actions.open(item) },
        h("img", { src: thumbnail(item.id, 256), alt: "" }), h("span", {}, item.exact ? "same bytes" : `saved again, ${item.score.toFixed(2)}`))))));
  }

  #beside(step) {
    const items = this.actions.items(), at = items.findIndex((item) => String(item.id) === this.id);
    return at < 0 ? undefined : items[at + step];
  }

  #turn(step) {
    const next = this.#beside(step);
    if (next) this.actions.open(next);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.item) return;
    const { more, change, less, locate } = this.actions;
    if (event.key === "ArrowRight") this.#turn(1);
    else if (event.key === "ArrowLeft") this.#turn(-1);
    else if (event.key === "m") more(this.item);
    else if (event.key === "c" && this.item.kind !== "text") change(this.item);
    else if (event.key === "l") less(this.item);
    else if (event.key === "g") locate(this.item);
    else return;
    event.preventDefault();
  }
}
