// A place for an image: choose a file, drop it, paste it, or take it with the camera.

import { takePhotograph } from "./camera.js";
import { make, vector } from "./dom.js";

const TYPES = ["image/jpeg", "image/png", "image/webp"];
const ARROW = "M12 16V5m0 0 4.5 4.5M12 5 7.5 9.5M5 19h14";

/**
 * Turns `place` into a picker; `changed(files)` is called with the files whenever they change, and
 * `spare(files)` with those that a picker of one image was given beyond the first.
 */
export class Picker {
  constructor(place, changed, spare = () => {}) {
    this.multiple = "multiple" in place.dataset;
    this.changed = changed;
    this.spare = spare;
    this.files = [];
    this.urls = [];
    this.label = place.dataset.label;
    this.input = make("input", {
      type: "file",
      accept: TYPES.join(","),
      multiple: this.multiple,
      className: "unseen",
      name: place.dataset.picker,
      "aria-label": this.label,
    });
    this.drop = make("label", { className: "drop" });
    this.strip = make("ul", { className: "strip", "aria-label": "Chosen images", hidden: true });
    const camera = make("button", { type: "button", textContent: "Camera" });
    camera.setAttribute("aria-label", `${this.label}: use the camera`);
    this.remove = make("button", { type: "button", textContent: "Remove", hidden: true });
    this.remove.setAttribute("aria-label", `${this.label}: remove`);
    const group = make(
      "fieldset",
      { className: "picker" },
      make("legend", { textContent: this.label }),
      this.drop,
      this.strip,
      make("div", { className: "buttons" }, camera, this.remove),
    );
    if (this.multiple) group.dataset.many = "";
    place.append(group);
    this.show();

    this.input.addEventListener("change", () => this.take(this.input.files));
    camera.addEventListener("click", async () => {
      const image = await takePhotograph();
      if (image) this.take([image]);
    });
    this.remove.addEventListener("click", () => {
      this.clear();
      this.input.focus();
    });
    for (const kind of ["dragenter", "dragover"]) {
      this.drop.addEventListener(kind, (event) => {
        event.preventDefault();
        this.drop.classList.add("over");
      });
    }
    this.drop.addEventListener("dragleave", () => this.drop.classList.remove("over"));
    this.drop.addEventListener("drop", (event) => {
      event.preventDefault();
      this.drop.classList.remove("over");
      this.take(event.dataTransfer.files);
    });
    group.addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.take(event.clipboardData.files);
    });
  }

  /** Add files, or take the first in the place of the one before. */
  take(files) {
    const given = [...files];
    if (!given.length) return;
    this.files = this.multiple ? [...this.files, ...given] : [given[0]];
    this.update();
    if (!this.multiple && given.length > 1) this.spare(given.slice(1));
  }

  /** Remove all. */
  clear() {
    this.files = [];
    this.update();
  }

  /** Draw the faces found on the only image: `faces` of the API, and which of them was decided by. */
  mark(faces, chosen = -1) {
    const image = this.drop.querySelector("img");
    this.drop.querySelector(".faces")?.remove();
    const found = faces.filter(Boolean); // null stands for an aligned crop
    if (!image || !found.length) return;
    const draw = async () => {
      await image.decode();
      const [width, height] = [image.naturalWidth, image.naturalHeight];
      const root = vector("svg", { viewBox: `0 0 ${width} ${height}`, class: "faces", "aria-hidden": "true" });
      const size = Math.max(width, height) / 18;
      found.forEach(({ box: [left, top, right, bottom] }, at) => {
        const kind = at === chosen ? "chosen" : "";
        root.append(vector("rect", { x: left, y: top, width: right - left, height: bottom - top, class: kind }));
        if (found.length === 1) return;
        const number = vector("text", { x: left, y: Math.max(top - size / 4, size), "font-size": size });
        number.textContent = at + 1;
        root.append(number);
      });
      if (image.isConnected) image.after(root);
    };
    draw().catch(() => {}); // an image that the browser cannot show is not drawn on
  }

  update() {
    this.input.value = "";
    this.show();
    this.changed(this.files);
  }

  show() {
    this.urls.forEach((url) => URL.revokeObjectURL(url));
    this.urls = this.files.map((file) => URL.createObjectURL(file));
    const single = !this.multiple && this.files.length === 1;
    this.drop.classList.toggle("filled", single);
    this.remove.hidden = !single;
    const focused = document.activeElement === this.input;
    this.drop.replaceChildren(this.input, ...(single ? [this.preview()] : invitation(this.multiple)));
    if (focused) this.input.focus();
    this.strip.hidden = !this.multiple || !this.files.length;
    this.strip.replaceChildren(...(this.multiple ? this.files.map((_, at) => this.item(at)) : []));
  }

  preview() {
    const image = make("img", { src: this.urls[0], alt: `${this.label}, chosen` });
    image.addEventListener("error", () => image.replaceWith(this.files[0]?.name ?? ""));
    return image;
  }

  item(at) {
    const remove = make("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove image ${at + 1}`);
    remove.addEventListener("click", () => {
      this.files.splice(at, 1);
      this.update();
      this.input.focus();
    });
    return make("li", {}, make("img", { src: this.urls[at], alt: `Image ${at + 1}` }), remove);
  }
}

function invitation(multiple) {
  const icon = vector("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" });
  const line = { fill: "none", stroke: "currentColor", "stroke-width": 1.8, "stroke-linecap": "round", "stroke-linejoin": "round" };
  icon.append(vector("path", { d: ARROW, ...line }));
  return [
    icon,
    make("strong", { textContent: multiple ? "Choose images" : "Choose an image" }),
    make("span", { className: "hint", textContent: "or drop, or paste" }),
  ];
}
