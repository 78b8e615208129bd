// Small helpers: every text goes in as text, never as markup.

/** An element with properties (or attributes, where the name has a dash or is `role`) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** An SVG element with attributes. */
export function vector(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Say something in a status line; `kind` is "", "busy", "done" or "error". */
export function say(line, text, kind = "") {
  line.className = `message ${kind}`;
  line.textContent = text;
}

/** Ask a yes-or-no question; resolves to a boolean. */
export function confirm(question, yes) {
  const dialog = document.querySelector("#confirm");
  dialog.querySelector("#confirm-text").textContent = question;
  dialog.querySelector("[data-yes]").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** "1 image", "2 images". */
export const count = (images) => (images === 1 ? "1 image" : `${images.toLocaleString("en")} images`);

/** "0.42", with a real minus sign. */
export const decimal = (value) => value.toFixed(2).replace("-", "−");

/** "99.8 %", and never a certainty. */
export function percent(share) {
  if (share > 0.9995) return "over 99.9 %";
  if (share < 0.0005) return "under 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

/** "1 in 1,000" of a rate. */
export const oneIn = (rate) => `1 in ${Math.round(1 / rate).toLocaleString("en")}`;
