// A person's kept crop, or initials where none is kept.

import { call } from "./api.js";
import { make } from "./dom.js";

/** Of a person or a match: decoration beside the name. */
export function portrait(person) {
  const place = make("span", { className: "portrait", textContent: initials(person.name), "aria-hidden": "true" });
  if (person.thumbnail) load(`people/${encodeURIComponent(person.name)}/thumbnail`, "", place);
  return place;
}

/** The crop at an address of the API; `instead` stands there where none is kept. */
export function crop(address, alt, instead) {
  const place = make("span", { className: "portrait", textContent: instead, role: "img", "aria-label": `${alt}, no crop is kept` });
  load(address, alt, place);
  return place;
}

async function load(address, alt, place) {
  try {
    const url = URL.createObjectURL(await call("GET", address));
    const image = make("img", { className: "portrait", src: url, alt });
    image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    place.replaceWith(image);
  } catch {
    // What stood there stays.
  }
}

function initials(name) {
  const words = name.split(/[\s_.-]+/u).filter(Boolean);
  const chosen = words.length > 1 ? [words[0], words[words.length - 1]] : words;
  return chosen.map((word) => [...word][0].toUpperCase()).join("");
}
