// One image, the people of the gallery it looks most like.

import { call } from "./api.js";
import { decimal, make, say } from "./dom.js";
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
    picker.mark([]);
    if (!image) return say(line, "The most similar people of the gallery will be listed here.");
    say(line, "Searching…", "busy");
    try {
      const found = await call("POST", "search", { image, crops: true, ...app.settings() });
      if (mine !== latest) return;
      result.replaceChildren(...show(found));
      picker.mark(found.faces.map((face) => face.face));
      result.hidden = false;
      say(line, "");
      line.append(make("span", { className: "unseen", textContent: found.faces.map((face) => `${title(face)}. ${face.matches.length} candidates.`).join(" ") }));
    } catch (error) {
      if (mine === latest) say(line, error.message, "error");
    }
  }

  search();
  return (files) => picker.take(files);
}

function title(face) {
  if (!face.matches.length) return "The gallery is empty";
  if (face.known === null) return "Most similar";
  return face.known ? face.matches[0].name : "Unknown person";
}

function show(found) {
  const faces = found.faces.flatMap((face, at) => one(face, at, found));
  const meaning = expected(found);
  return meaning ? [...faces, make("p", { className: "hint", textContent: meaning })] : faces;
}

/** What the mark on the bars is, and what the false accept rate means for a gallery of this size. */
function expected(found) {
  if (found.fpir === null || !found.people) return "";
  const mark = `The mark on each bar is the threshold, ${decimal(found.threshold)}. `;
  return mark + (found.fpir > 0.5
    ? "In a gallery of this size, most strangers would be named by mistake at this false accept rate: choose a lower one."
    : `In a gallery of this size, about one stranger in ${Math.round(1 / found.fpir).toLocaleString("en")} would be named by mistake.`);
}

function one(face, at, found) {
  const notes = { true: "at or above the threshold", false: "nobody reaches the threshold", null: "no threshold: the model is not calibrated" };
  const note = face.matches.length ? notes[face.known] : "enrol a person first";
  const name = found.faces.length > 1 ? `Face ${at + 1}: ${title(face)}` : title(face);
  const top = make(
    "div",
    { className: `found ${face.known ? "yes" : ""}` },
    make("img", { src: face.crop, alt: "Aligned face of the image" }),
    ...(face.known && face.matches[0].thumbnail ? [portrait(face.matches[0])] : []),
    make("div", {}, make("h3", { textContent: name }), make("p", { className: "hint", textContent: note })),
  );
  const rows = face.matches.map((match, rank) => row(match, rank + 1, found.threshold));
  const label = found.faces.length > 1 ? `Candidates of face ${at + 1}` : "Candidates";
  return rows.length ? [top, make("ol", { className: "people", "aria-label": label }, ...rows)] : [top];
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
  const words = [`similarity ${decimal(match.similarity)}`];
  if (match.same !== null) words.push(match.same ? "at or above the threshold" : "below the threshold");
  return make(
    "li",
    { className: kind },
    make("span", { className: "rank", textContent: rank, "aria-hidden": "true" }),
    portrait(match),
    make("div", { className: "who" }, make("div", { className: "name", textContent: match.name }), bar),
    make("span", { className: "unseen", textContent: words.join(", ") }),
    make("div", { className: "figure", "aria-hidden": "true", textContent: decimal(match.similarity), title: "similarity" }),
  );
}
