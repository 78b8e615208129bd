// One picture, the people of the gallery it looks most like.

import { call } from "./api.js";
import { decimal, make, percent, say } from "./dom.js";
import { Picker } from "./picker.js";
import { portrait } from "./portrait.js";

export function startSearch(panel, app) {
  const line = panel.querySelector("[data-message]");
  const result = panel.querySelector("[data-result]");
  let latest = 0;
  const picker = new Picker(panel.querySelector("[data-picker]"), search);
  app.onSettings(search);
  app.onPeople(search);

  async function search() {
    const [image] = picker.files;
    const mine = ++latest;
    result.hidden = true;
    if (!image) return say(line, "The most similar people of the gallery will be listed here.");
    say(line, "Searching…", "busy");
    try {
      const found = await call("POST", "search", { image, crops: true, ...app.settings() });
      if (mine !== latest) return;
      result.replaceChildren(...show(found));
      result.hidden = false;
      say(line, "");
      line.append(make("span", { className: "unseen", textContent: `${title(found)}. ${found.matches.length} candidates.` }));
    } catch (error) {
      if (mine === latest) say(line, error.message, "error");
    }
  }

  search();
  return (files) => picker.take(files);
}

function title(found) {
  if (!found.matches.length) return "The gallery is empty";
  if (found.known === null) return "Most similar";
  return found.known ? found.matches[0].name : "Unknown person";
}

function show(found) {
  const notes = { true: "at or above the threshold", false: "nobody reaches the threshold", null: "no threshold: the model is not calibrated" };
  const note = found.matches.length ? notes[found.known] : "enrol somebody first";
  const top = make(
    "div",
    { className: `found ${found.known ? "yes" : ""}` },
    make("img", { src: found.crop, alt: "Aligned face of the picture" }),
    make("div", {}, make("h3", { textContent: title(found) }), make("p", { className: "hint", textContent: note })),
  );
  const rows = found.matches.map((match, at) => row(match, at + 1, found.threshold));
  return rows.length ? [top, make("ol", { className: "people", "aria-label": "Candidates" }, ...rows)] : [top];
}

function row(match, rank, threshold) {
  const share = (value) => `${Math.max(0, Math.min(1, value)) * 100}%`;
  const fill = make("i");
  fill.style.width = share(match.similarity);
  const bar = make("div", { className: "bar", "aria-hidden": "true" }, fill);
  if (threshold !== null) {
    const edge = make("b");
    edge.style.left = share(threshold);
    bar.append(edge);
  }
  const kind = match.same === null ? "" : match.same ? "same" : "below";
  const told = [`similarity ${decimal(match.similarity)}`];
  if (match.probability !== null) told.push(`probability ${percent(match.probability)}`);
  if (match.same !== null) told.push(match.same ? "at or above the threshold" : "below the threshold");
  return make(
    "li",
    { className: kind },
    make("span", { className: "rank", textContent: rank, "aria-hidden": "true" }),
    portrait(match),
    make("div", { className: "who" }, make("div", { className: "name", textContent: match.name }), bar),
    make("span", { className: "unseen", textContent: told.join(", ") }),
    make(
      "div",
      { className: "figure", "aria-hidden": "true" },
      make("div", { textContent: decimal(match.similarity), title: "similarity" }),
      match.probability === null ? null : make("div", { className: "hint", textContent: percent(match.probability) }),
    ),
  );
}
