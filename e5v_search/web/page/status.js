// What the collection holds, what could not be used, and index runs as they go.

import { $, broken, bytes, h, number, plural, redraw } from "./dom.js";
import { ask } from "./state.js";

export class Status {
  constructor(dialog, { changed }) {
    this.dialog = dialog;
    this.changed = changed;
    this.source = this.run = null;
    this.version = "";
  }

  // hears of changes from the service while the page is seen: a browser has six connections for all its windows
  listen() {
    const seen = () => {
      this.source?.close();
      if (document.visibilityState === "visible") this.#hear();
    };
    document.addEventListener("visibilitychange", seen);
    addEventListener("pagehide", () => this.source?.close());
    addEventListener("pageshow", (event) => { if (event.persisted) seen(); });
    seen();
  }

  #hear() {
    this.source = new EventSource("/api/events");
    this.source.addEventListener("message", (event) => {
      const { version, run } = JSON.parse(event.data);
      const isNew = this.version && version !== this.version;
      this.version = version;
      this.run = run;
      $("busy").hidden = !run.running;
      if (this.dialog.open) this.#progress(isNew && !run.running);
      if (isNew) this.#soon();
    });
  }

  #soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.changed(), 400);
  }

  async open() {
    if (!this.dialog.open) this.dialog.showModal();
    try {
      const [status, failures] = await Promise.all([ask("/api/status"), ask("/api/failures")]);
      this.#draw(status, failures.failed);
    } catch (error) {
      this.#show([h("p", { className: "missing" }, error.message)]);
    }
  }

  #close() { return this.dialog.querySelector(".close"); }

  #show(children) {
    const close = h("button", { type: "button", className: "icon close", "data-key": "close", "aria-label": "Close" }, "✕");
    redraw(this.dialog, [h("header", {}, h("h2", { id: "status-title" }, "The collection"), close), ...children], () => this.#close());
  }

  #draw(status, failed) {
    const { items, index } = status;
    const rows = [
      ["folder", broken(status.collection)],
      ["model", status.fingerprint ?? "none yet"],
      ["photos", number(items.image)],
      ...(items.text ? [["texts", number(items.text)]] : []),
      ...(items.rendered ? [["rendered texts", number(items.rendered)]] : []),
      ["index", `${index.kind}, ${plural(index.vectors, "vector")}`],
      ["on disk", bytes(status.bytes)],
    ];
    this.#show([
      h("dl", {}, ...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, ...[value].flat())))),
      h("section", { id: "run" }),
      failed.length ? h("section", { id: "failed" }, h("h3", {}, `${plural(failed.length, "file")} could not be used`),
        h("ul", { tabIndex: 0, "aria-label": "Files that could not be used" }, ...failed.map((each) => h("li", {}, h("b", {}, ...broken(each.path)), h("span", {}, each.reason))))) : h("p", {}, "Every file could be used."),
    ]);
    this.#progress();
  }

  #progress(ended = false) {
    if (ended) { this.open(); return; }
    const { run } = this, section = $("run");
    if (!run || !section) return;
    const start = run.allowed && !run.running
      ? h("button", { type: "button", className: "main", "data-key": "start", onclick: () => this.#start() }, "Look for new photos") : null;
    const done = run.running
      ? [h("h3", {}, "Looking through the folders…"), h("progress", run.total ? { max: run.total, value: run.done, "aria-label": "Progress" } : { "aria-label": "Progress" }), h("p", { role: "status" }, run.total ? `${number(run.done)} of ${number(run.total)}${run.failed ? `, ${number(run.failed)} failed` : ""}` : "Counting what is there…")]
      : run.error ? [h("p", { className: "missing" }, run.error)]
        : run.total ? [h("p", { role: "status" }, `Last run: ${number(run.added)} added, ${number(run.updated)} updated, ${number(run.removed)} removed, ${number(run.failed)} failed.`)] : [];
    redraw(section, [...done, start], () => this.#close());
  }

  async #start() {
    try {
      this.run = await ask("/api/index", {}, { method: "POST" });
      this.#progress();
    } catch (error) {
      redraw($("run"), [h("p", { className: "missing" }, error.message)], () => this.#close());
    }
  }
}
