// Elements and words. Whatever names and texts hold, they only ever become text.

export const $ = (id) => document.getElementById(id);

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  for (const d of [path].flat()) {
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("d", d);
    svg.append(line);
  }
  return svg;
}

export const ICONS = {
  more: "M4 8c3-4 6 4 10 0 2-2 4-2 6-1M4 16c3-4 6 4 10 0 2-2 4-2 6-1",
  change: "M4 20l1-5L16 4l4 4L9 19l-5 1zM14 6l4 4",
  less: "M5 12h14",
  map: ["M12 21s6.5-6 6.5-11a6.5 6.5 0 0 0-13 0c0 5 6.5 11 6.5 11z", "M12 12.2a2.2 2.2 0 1 0 0-4.4 2.2 2.2 0 0 0 0 4.4z"],
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  close: "M6 6l12 12M18 6L6 18",
};

export const number = (value) => value.toLocaleString("en");
export const plural = (n, one, many = `${one}s`) => `${number(n)} ${n === 1 ? one : many}`;

export function bytes(n) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  while (n >= 1000 && units.length > 1) { n /= 1000; units.shift(); }
  return `${units[0] === "bytes" || n >= 10 ? Math.round(n) : n.toFixed(1)} ${units[0]}`;
}

export const fileName = (path) => path?.split(/[\\/]/).pop() ?? "";
export const folderOf = (path) => path?.split(/[\\/]/).slice(0, -1).join("/") ?? "";

export function named(item) {
  if (item.kind === "image") return fileName(item.path);
  return item.text ?? `text ${item.id}`;
}

export const day = (moment) => new Date(moment.slice(0, 19)).toLocaleDateString("en", { year: "numeric", month: "long", day: "numeric" });

export const thumbnail = (id, size) => `/api/items/${id}/thumbnail?size=${size}`;

// New children for an element. What has the focus in it keeps it, by its data-key, or else hands it on to `next()`.
export function redraw(element, children, next) {
  const held = element.contains(document.activeElement) ? document.activeElement : null;
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  if (!held || document.activeElement === held) return;
  const { key } = held.dataset, same = key && [...element.querySelectorAll("[data-key]")].find((each) => each.dataset.key === key);
  (same || next())?.focus({ preventScroll: true });
}

// A path that may be broken where its folders end.
export const broken = (path) => path.split(/(?<=[\\/])/).flatMap((part) => [part, document.createElement("wbr")]);

let saidTimer = 0;
export function say(text) {
  $("said").textContent = text;
  clearTimeout(saidTimer);
  saidTimer = setTimeout(() => { $("said").textContent = ""; }, 6000);
}
