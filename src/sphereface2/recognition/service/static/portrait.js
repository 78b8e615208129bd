// A person's kept crop, or initials where none is kept.

import { call } from "./api.js";
import { make } from "./dom.js";

export function portrait(person) {
  const place = make("span", { className: "portrait", textContent: initials(person.name), "aria-hidden": "true" });
  if (person.thumbnail) load(person.name, place);
  return place;
}

async function load(name, place) {
  try {
    const url = URL.createObjectURL(await call("GET", `people/${encodeURIComponent(name)}/thumbnail`));
    const image = make("img", { className: "portrait", src: url, alt: "" });
    image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    place.replaceWith(image);
  } catch {
    // The initials stay.
  }
}

function initials(name) {
  const words = name.split(/[\s_.-]+/u).filter(Boolean);
  const chosen = words.length > 1 ? [words[0], words[words.length - 1]] : words;
  return chosen.map((word) => [...word][0].toUpperCase()).join("");
}
