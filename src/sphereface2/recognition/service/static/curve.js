// The calibrated curve with one similarity marked on it, as SVG.

import { decimal, percent, vector } from "./dom.js";

const [WIDTH, HEIGHT] = [560, 270];
const [LEFT, RIGHT, TOP, BOTTOM] = [70, 20, 54, 50];

/** `curve`: {similarity, probability}; `verdict`: {similarity, probability, threshold}. */
export function drawCurve(curve, verdict) {
  const low = Math.max(-1, Math.min(-0.3, Math.floor((verdict.similarity - 0.05) * 10) / 10));
  const x = (value) => LEFT + ((value - low) / (1 - low)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM);
  const root = vector("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    class: "curve",
    role: "img",
    "aria-label":
      `Curve of the probability that two images show one person, over their similarity. ` +
      `This pair: similarity ${decimal(verdict.similarity)}, probability ${percent(verdict.probability)}; ` +
      `the threshold is ${decimal(verdict.threshold)}.`,
  });

  for (const share of [0, 0.5, 1]) {
    root.append(
      vector("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share) }),
      text(LEFT - 8, y(share) + 4, `${100 * share} %`, "end"),
    );
  }
  for (let tick = Math.ceil(low * 5) / 5; tick <= 1.001; tick += 0.2) {
    root.append(text(x(tick), HEIGHT - BOTTOM + 20, tick.toFixed(1).replace("-0.0", "0.0").replace("-", "−"), "middle"));
  }
  root.append(
    text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "similarity", "middle"),
    text(4, 18, "probability of the same person", "start"),
  );

  const points = curve.similarity
    .map((similarity, at) => [similarity, curve.probability[at]])
    .filter(([similarity]) => similarity >= low)
    .map(([similarity, probability]) => `${x(similarity).toFixed(1)},${y(probability).toFixed(1)}`);
  const edge = x(verdict.threshold);
  root.append(
    vector("line", { class: "threshold", x1: edge, x2: edge, y1: y(1), y2: y(0) }),
    vector("polyline", { class: "line", points: points.join(" ") }),
  );

  const [px, py] = [x(verdict.similarity), y(verdict.probability)];
  // Below the curve where it is high, above it and before the point where it rises.
  const high = verdict.probability > 0.85;
  const left = px > (high ? WIDTH * 0.85 : LEFT + 80);
  const lift = high ? 26 : -12;
  root.append(
    vector("line", { class: "drop-line", x1: px, x2: px, y1: py, y2: y(0) }),
    vector("circle", { class: "point", cx: px, cy: py, r: 7 }),
    text(px + (left ? -12 : 12), py + lift, decimal(verdict.similarity), left ? "end" : "start", "value"),
    text(edge, y(1) - 8, "threshold", edge > WIDTH * 0.8 ? "end" : "start"),
  );
  return root;
}

function text(x, y, content, anchor, kind = "") {
  const made = vector("text", { x, y, "text-anchor": anchor, class: kind });
  made.textContent = content;
  return made;
}
