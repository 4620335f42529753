"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const kindOf = bytes(data.kind);
  const n = kindOf.length;
  const kinds = data.kinds;
  const number = (value) => value.toLocaleString("en");
  const percent = (value) => `${(100 * value).toFixed(1)} %`;

  // --- what is shown of each item

  const name = (i) => data.names[i];
  const place = (i) => data.places[data.place[i]];
  const picture = (i) => (data.thumbnails[i] ? `data:image/jpeg;base64,${data.thumbnails[i]}` : "");
  const lower = data.names.map((text, i) => `${text}\n${place(i)}`.toLowerCase());
  const on = kinds.map(() => true);
  let words = "";
  const matches = new Uint8Array(n).fill(1);
  const visible = (i) => on[kindOf[i]] && matches[i];

  const map = new PointMap($("map"), {
    picture,
    visible,
    faint: (i) => on[kindOf[i]] && !matches[i],
    pictures: () => $("pictures").checked,
    moved: listSoon,
    drawn: placeCard,
    picked(i) {
      if (i >= 0) $("said").textContent = [kinds[kindOf[i]].noun, name(i), data.notes[i], place(i)].filter(Boolean).join(", ");
    },
  });

  // --- one item: under the pointer, or picked

  let shown = -1;
  function placeCard() {
    const i = map.hovered >= 0 ? map.hovered : map.picked, card = $("card");
    card.hidden = i < 0;
    if (i < 0) { shown = -1; return; }
    if (i !== shown) {
      shown = i;
      $("thumb").hidden = !data.thumbnails[i];
      $("thumb").src = picture(i) || "data:,";
      $("thumb").alt = name(i);
      $("name").textContent = name(i);
      $("place").textContent = place(i);
      $("note").textContent = [kinds[kindOf[i]].noun, data.notes[i]].filter(Boolean).join(" · ");
    }
    const x = map.left(map.X[i]), y = map.top(map.Y[i]), gap = 16 + ($("pictures").checked && data.thumbnails[i] ? PointMap.PICTURE / 2 : 0);
    const w = card.offsetWidth, h = card.offsetHeight;
    const at = x + gap + w < map.width ? x + gap : x - gap - w;
    card.style.transform = `translate(${Math.max(8, Math.min(at, map.width - w - 8))}px, ${Math.max(8, Math.min(y - h / 2, map.height - h - 8))}px)`;
  }
  $("thumb").addEventListener("load", () => map.ask());

  $("in").addEventListener("click", () => map.zoom(1.6));
  $("out").addEventListener("click", () => map.zoom(1 / 1.6));
  $("all").addEventListener("click", () => map.fit());

  // --- the list: what was found, or what is in view

  const LISTED = 100;
  let listTimer = 0;
  function listSoon() {
    clearTimeout(listTimer);
    listTimer = setTimeout(list, 150);
  }

  function list() {
    const found = [...(words ? map.members : map.inView())].filter(visible);
    const far = (i) => (map.X[i] - map.view.x) ** 2 + (map.Y[i] - map.view.y) ** 2;
    if (found.length <= 20000) found.sort((a, b) => far(a) - far(b));
    $("found").textContent = `${number(found.length)} ${words ? "found" : "in view"}${found.length > LISTED ? `, the ${LISTED} nearest the middle listed` : ""}`;
    $("list").replaceChildren(...found.slice(0, LISTED).map(entry));
  }

  function entry(i) {
    const item = document.createElement("li"), button = document.createElement("button"), label = document.createElement("span");
    const face = document.createElement(data.thumbnails[i] ? "img" : "i");
    if (data.thumbnails[i]) {
      face.loading = "lazy";
      face.alt = "";
      face.src = picture(i);
    } else face.textContent = kinds[kindOf[i]].name === "image" ? "▣" : "¶";
    label.textContent = name(i);
    button.append(face, label);
    button.addEventListener("click", () => { map.pick(i); map.flyTo(i); listSoon(); });
    button.addEventListener("mouseenter", () => map.hover(i));
    button.addEventListener("focus", () => map.hover(i));
    button.addEventListener("mouseleave", () => map.hover(-1));
    button.addEventListener("blur", () => map.hover(-1));
    item.append(button);
    return item;
  }

  function filtered() {
    map.hover(-1);
    map.changed();
    listSoon();
  }

  $("query").addEventListener("input", (event) => {
    words = event.target.value.trim().toLowerCase();
    const parts = words.split(/\s+/);
    for (let i = 0; i < n; i++) matches[i] = !words || parts.every((part) => lower[i].includes(part)) ? 1 : 0;
    filtered();
  });
  $("pictures").addEventListener("change", () => map.ask());

  // --- what the page says

  $("title").textContent = data.title;
  $("about").textContent = data.about;
  $("facts").textContent = data.facts;
  $("map").setAttribute("aria-label", `Map of ${number(n)} items`);
  kinds.forEach((kind, k) => {
    const button = document.createElement("button"), swatch = document.createElement("i"), count = document.createElement("span");
    swatch.className = kind.name;
    count.textContent = number(kind.count);
    button.append(swatch, kind.label, count);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      on[k] = !on[k];
      button.setAttribute("aria-pressed", String(on[k]));
      filtered();
    });
    $("kinds").append(button);
  });
  $("gaps").hidden = !data.gaps.length;
  for (const gap of data.gaps) {
    const row = document.createElement("tr");
    const spread = document.createElement("small");
    spread.textContent = ` / ${gap.spread.toFixed(2)}`;
    const cells = [`${gap.a} – ${gap.b}`, gap.distance.toFixed(2), percent(gap.accuracy)].map((text) => {
      const td = document.createElement("td");
      td.textContent = text;
      return td;
    });
    cells[1].append(spread);
    row.append(...cells);
    document.querySelector("#gaps tbody").append(row);
  }

  map.points(new Float32Array(bytes(data.xy).buffer), kindOf, kinds.map((kind) => kind.name));
})();
