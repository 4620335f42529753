// A small map of the world to choose places on: land as dots, photos as discs.

import { h, plural } from "./dom.js";

const WIDTH = 560, HEIGHT = 280, COLUMNS = 144, ROWS = 72, REACH = 30; // pixels of the drawing, cells of 2.5°, of a click
// a bit for each cell from the north-west on: whether it is land (what is not blue in samples/world-map.jpg)
const LAND = [
  "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA////8AAAAAAAAAAAAAAAAAAB/H//8AAgAAAAAAAAAA",
  "AAAAABcAf/8AAAAAAAHwAAAAAAADgKYAP/4AAAACAD/8AAAAAAAAfCfgH/4AAAAAG/////AAA////no4H+AAA/4B////////4/////4cH4AAB///////////",
  "A/////AcDgCAD3/////////+A////8BgBgAAPn////////74AOB//8B6AAAAHn///////4CAAAAf//h/AAACBP///////gOAAAAP//7/gAAPP////////wMA",
  "AAAH////gAAD/////////4AAAAAD///8QAAB/////////wAAAAAD///8AAAB///3/////gAAAAAD///wAAAB+/Dv/////EAAAAAD///gAAAPhvb3////8AAA",
  "AAAB///AAAAPAJ/3////IIAAAAAB///AAAAG8A//////MwAAAAAA//+AAAAH+AP/////AAAAAAAAf/8AAAAP/v//////gAAAAAAAP8EAAAAf////////gAAA",
  "AAAAD4AAAAA////z////AAAAAAAAB4AAAAA///3+H//+AAAAAAAAA4AAAAB///7/D+f4AAAAAAAAA9gQAAB///7+B8PgAAAAAAAAAPgAAAB///94B4PggAAA",
  "AAAAAA4AAAB////gAwHwAAAAAAAAAAY4AAA////QAwBgAAAAAAAAAAB/AAAf///wAQAAQAAAAAAAAAB/gAAP///wAACAAAAAAAAAAAB/4AAAD//gAAGGAAAA",
  "AAAAAAD/8AAAD//AAACOAAAAAAAAAAD//AAAD/+AAADOAAAAAAAAAAD//4AAD/8AAABAg4AAAAAAAAD//8AAB/8AAAAAAeAAAAAAAAD//8AAB/8AAAAAAIAA",
  "AAAAAAB//4AAB/8AAAAAAAAAAAAAAAB//4AAB/8QAAAADkAAAAAAAAA//wAAB/8wAAAAfsAAAAAAAAAP/wAAB/4wAAAA/+AAAAAAAAAP/wAAB/xgAAAD//AA",
  "AAAAAAAP/AAAA/xgAAAH//gAAAAAAAAP+AAAA/gAAAAH//gAAAAAAAAf8AAAA/gAAAAD//gAAAAAAAAf8AAAAfAAAAAD//gAAAAAAAAf4AAAAeAAAAADg/gA",
  "AAAAAAAfgAAAAAAAAAAAAPAAAAAAAAAfAAAAAAAAAAAAAAACAAAAAAAeAAAAAAAAAAAAAAAAAAAAAAAcAAAAAAAAAAAAAAAYAAAAAAA4AAAAAAAAAAAAAAAQ",
  "AAAAAAA4AAAAAAAAAAAAAAAAAAAAAAA4AAAAAAAAAAAAAAAAAAAAAAAYAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
  "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAADAAAAAAAEAAPABAAAAAAAAAAHAAAAAAD/8f////gAAAAAAAAfAAAP///////////g",
  "AAAAAfz/AAD////////////AAAf/////gAf///////////+AwP///////f//////////////////////////////////////////////////////////////",
  "////////////////////////////////////////////////",
].join("");

const at = ({ lat, lon }) => [((lon + 180) / 360) * WIDTH, ((90 - lat) / 180) * HEIGHT];

export function world(places, isChosen, pick) {
  const canvas = h("canvas", { className: "world", width: WIDTH, height: HEIGHT, role: "img", "aria-label": `${plural(places.length, "place")} on a map of the world; they are listed below` });
  canvas.addEventListener("click", (event) => {
    const scale = WIDTH / canvas.clientWidth, x = event.offsetX * scale, y = event.offsetY * scale;
    const away = (place) => Math.hypot(at(place)[0] - x, at(place)[1] - y);
    const nearest = places.reduce((a, b) => (away(a) < away(b) ? a : b));
    if (away(nearest) < REACH) pick(nearest);
  });
  draw(canvas.getContext("2d"), places, isChosen);
  return canvas;
}

function draw(context, places, isChosen) {
  const style = getComputedStyle(document.documentElement);
  const [land, accent, ink] = ["--land", "--accent", "--ink"].map((name) => style.getPropertyValue(name).trim());
  const disc = (x, y, radius) => { context.beginPath(); context.arc(x, y, radius, 0, 2 * Math.PI); context.fill(); };
  context.fillStyle = land;
  const bits = Uint8Array.from(atob(LAND), (c) => c.charCodeAt(0)), side = WIDTH / COLUMNS;
  for (let cell = 0; cell < COLUMNS * ROWS; cell++) {
    if (bits[cell >> 3] & (128 >> (cell & 7))) disc(((cell % COLUMNS) + 0.5) * side, (Math.floor(cell / COLUMNS) + 0.5) * side, 1.45);
  }
  const most = Math.max(...places.map((place) => place.count));
  context.globalAlpha = 0.8;
  for (const place of places) {
    context.fillStyle = isChosen(place) ? ink : accent;
    disc(...at(place), 5 + 8 * Math.sqrt(place.count / most));
  }
}
