// What is asked, as the address bar holds it, and how the service is asked.

const LISTS = ["plus", "minus", "f"];
const WORDS = ["q", "image", "upload", "modify", "t", "from", "to", "item", "view"];

export const uploads = new Map(); // pictures that were dropped, by name; they live as long as this page does

export function read(search = location.search) {
  const parameters = new URLSearchParams(search);
  const state = {};
  for (const name of WORDS) state[name] = parameters.get(name) ?? "";
  for (const name of LISTS) state[name] = parameters.getAll(name);
  return state;
}

export function address(state) {
  const parameters = new URLSearchParams();
  for (const name of WORDS) if (state[name]) parameters.set(name, state[name]);
  for (const name of LISTS) for (const value of state[name]) parameters.append(name, value);
  const text = parameters.toString();
  return text ? `/?${text}` : "/";
}

// a term is written as the service reads it: TEXT:WEIGHT or image:ID:WEIGHT
export function parseTerm(term) {
  const found = /^(.*):([\d.]+)$/s.exec(term);
  const [what, weight] = found && found[1] !== "image" ? [found[1], Number(found[2])] : [term, 1];
  return what.startsWith("image:") ? { image: what.slice(6), weight } : { text: what, weight };
}

export const writeTerm = ({ image, text, weight }) => `${image ? `image:${image}` : text}:${weight}`;

// filters on the same fact: one of them is enough; those on the fact `except` are left out
export function where(state, except = "") {
  const groups = new Map();
  for (const each of state.f) {
    const name = /^[\w.]+/.exec(each)?.[0] ?? each;
    groups.set(name, [...(groups.get(name) ?? []), each]);
  }
  groups.delete(except);
  const found = [...groups.values()].map((parts) => parts.join(" or "));
  if (state.from && except !== "taken") found.push(`taken>=${state.from}`);
  if (state.to && except !== "taken") found.push(`taken<=${state.to}`);
  return found;
}

export const asks = (state) => Boolean(state.q || state.image || state.upload || state.plus.length);

export class Refused extends Error {}

export async function ask(path, parameters = {}, options = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) for (const each of [value].flat()) if (each !== "") query.append(name, each);
  const text = query.toString();
  const answer = await fetch(text ? `${path}?${text}` : path, options);
  if (answer.status === 429 && !options.again) {
    await new Promise((later) => setTimeout(later, 1000));
    return ask(path, parameters, { ...options, again: true });
  }
  const found = await answer.json();
  if (!answer.ok) throw new Refused(found.error ?? answer.statusText);
  return found;
}

export function search(state, k, signal) {
  const parameters = { k, plus: state.plus, minus: state.minus, where: where(state) };
  if (state.modify && (state.image || state.upload)) parameters.modify = state.modify;
  else if (state.q) parameters.q = state.q;
  if (!state.upload) return ask("/api/search", { ...parameters, image: state.image }, { signal });
  const picture = uploads.get(state.upload);
  if (!picture) throw new Refused("the picture of this search was not kept: drop it here once more");
  const form = new FormData();
  form.append("image", picture);
  for (const [name, value] of Object.entries(parameters)) for (const each of [value].flat()) form.append(name, each);
  return ask("/api/search", {}, { method: "POST", body: form, signal });
}
