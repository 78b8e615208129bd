// Two images, one verdict.

import { call } from "./api.js";
import { drawCurve } from "./curve.js";
import { decimal, make, oneIn, percent, say } from "./dom.js";
import { Picker } from "./picker.js";

export function startVerify(panel, app) {
  const line = panel.querySelector("[data-message]");
  const result = panel.querySelector("[data-result]");
  let latest = 0;
  const pickers = [...panel.querySelectorAll("[data-picker]")].map(
    (place, at) => new Picker(place, compare, ([file]) => pickers[1 - at].take([file])),
  );
  app.onSettings(compare);

  async function compare() {
    const mine = ++latest;
    await null; // two images dropped together come one after the other
    if (mine !== latest) return;
    const [a, b] = pickers.map((picker) => picker.files[0]);
    result.hidden = true;
    pickers.forEach((picker) => picker.mark([]));
    if (!a || !b) return say(line, "");
    say(line, "Comparing…", "busy");
    try {
      const verdict = await call("POST", "verify", { a, b, crops: true, ...app.settings() });
      if (mine !== latest) return;
      result.replaceChildren(show(verdict, app.model));
      const { a: first, b: second } = verdict.pairs[0];
      pickers[0].mark(verdict.faces[0], first);
      pickers[1].mark(verdict.faces[1], second);
      result.hidden = false;
      say(line, "");
      line.append(make("span", { className: "unseen", textContent: summary(verdict) }));
    } catch (error) {
      if (mine === latest) say(line, error.message, "error");
    }
  }

  /** Images pasted somewhere on the page. */
  return (files) => (pickers.find((picker) => !picker.files.length) ?? pickers[0]).take(files);
}

function title(verdict) {
  if (verdict.same === null) return `Similarity ${decimal(verdict.similarity)}`;
  return verdict.same ? "The same person" : "Different people";
}

function summary(verdict) {
  const words = `${title(verdict)}. Similarity ${decimal(verdict.similarity)}`;
  return verdict.probability === null ? words : `${words}, probability ${percent(verdict.probability)}.`;
}

function show(verdict, model) {
  const kind = { true: "yes", false: "no", null: "" }[verdict.same];
  const sign = { true: "✓", false: "≠", null: "?" }[verdict.same];
  const rows = [["Similarity", decimal(verdict.similarity)]];
  if (verdict.same !== null) {
    rows.push(
      ["Probability", percent(verdict.probability)],
      ["Threshold", decimal(verdict.threshold)],
      ["False accepts", oneIn(verdict.far)],
    );
  }
  const words = make(
    "div",
    {},
    make(
      "div",
      { className: "crops" },
      ...verdict.crops.map((src, at) => make("img", { src, alt: `Aligned face of image ${at + 1}` })),
    ),
    make(
      "h3",
      {},
      make("span", { className: "mark", textContent: sign, "aria-hidden": "true" }),
      make("span", { textContent: title(verdict) }),
    ),
    make("dl", {}, ...rows.flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { textContent: value }),
    ])),
    ...verdict.warnings.map((warning) => make("p", { className: "hint", textContent: `Poor image: ${warning}.` })),
  );
  const side = model?.curve
    ? make(
        "div",
        {},
        drawCurve(model.curve, verdict),
        make("p", { className: "hint", textContent: "Probability with even odds beforehand." }),
      )
    : make("p", {
        className: "hint",
        textContent: "The model is not calibrated, so there is no threshold to decide by: run sphereface2 calibrate.",
      });
  return make("div", { className: `verdict ${kind}` }, words, side);
}
