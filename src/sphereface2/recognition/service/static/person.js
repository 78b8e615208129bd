// One person: name, metadata, images; renamed, and images added and removed, in a dialog.

import { call } from "./api.js";
import { confirm, count, make, say } from "./dom.js";
import { enrol, warningsOf } from "./enrol.js";
import { Picker } from "./picker.js";
import { crop } from "./portrait.js";

/** Opens the dialog; resolves when it is closed, to whether anything was changed. */
export async function showPerson(name, app) {
  const dialog = document.querySelector("#person");
  const body = dialog.querySelector("[data-body]");
  const line = dialog.querySelector("[data-message]");
  const title = dialog.querySelector("h2");
  let changed = false;
  let picker = null;
  title.textContent = name;
  body.replaceChildren();
  dialog.showModal();
  const closed = new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  await attempt(load);
  await closed;
  body.replaceChildren();
  return changed;

  /** Does something with the server, and says what went wrong. */
  async function attempt(work, busy = "Loading…") {
    say(line, busy, "busy");
    try {
      const success = await work();
      say(line, success ?? "", success && "done");
    } catch (error) {
      say(line, error.message, "error");
    }
  }

  async function load() {
    const person = await call("GET", `${address()}/images`);
    title.textContent = name = person.name;
    const facts = Object.entries(person.metadata).flatMap(([key, value]) => [
      make("dt", { textContent: key }),
      make("dd", { textContent: value ?? "–" }),
    ]);
    const place = make("div");
    place.dataset.picker = "more-images";
    place.dataset.label = "More images";
    place.dataset.multiple = "";
    picker = new Picker(place, (files) => (addButton.hidden = !files.length));
    const addButton = make("button", { type: "submit", className: "primary", textContent: "Add", hidden: true });
    const add = make("form", { noValidate: true }, place, addButton);
    add.addEventListener("submit", (event) => {
      event.preventDefault();
      addImages(addButton);
    });
    body.replaceChildren(
      ...(facts.length ? [make("dl", { "aria-label": "Metadata" }, ...facts)] : []),
      make("h3", { textContent: count(person.images), tabIndex: -1 }),
      make("ul", { className: "images" }, ...person.enrolled.map((image, at) => item(person, image, at))),
      renaming(),
      add,
    );
  }

  function item(person, image, at) {
    const label = `image ${at + 1}`;
    const remove = make("button", { type: "button", className: "danger", textContent: "Remove", "aria-label": `Remove ${label}` });
    remove.hidden = person.images === 1; // the last one goes with the person
    remove.addEventListener("click", async () => {
      if (!(await confirm(`Remove ${label} of ${name}?`, "Remove"))) return;
      await attempt(async () => {
        await call("DELETE", `${address()}/images/${image.id}`);
        changed = true;
        await load();
        body.querySelector("h3").focus();
        return `Image ${at + 1} was removed.`;
      }, "Removing…");
    });
    return make(
      "li",
      {},
      crop(`${address()}/images/${image.id}/crop`, `Image ${at + 1}`, String(at + 1)),
      make("span", { className: "hint", textContent: image.source ?? "" }),
      remove,
    );
  }

  function renaming() {
    const input = make("input", { id: "person-name", name: "name", maxLength: 200, autocomplete: "off", required: true, value: name });
    const form = make(
      "form",
      { className: "rename", noValidate: true },
      make("label", { className: "field", htmlFor: input.id, textContent: "Name" }, input),
      make("button", { type: "submit", textContent: "Rename" }),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const wanted = input.value.trim();
      if (!wanted || wanted === name) return input.focus();
      attempt(async () => {
        const person = await call("PATCH", address(), { name: wanted });
        title.textContent = name = person.name;
        changed = true;
        return `The name is now ${name}.`;
      }, "Renaming…");
    });
    return form;
  }

  async function addImages(button) {
    button.disabled = true;
    await attempt(async () => {
      const person = await enrol(name, picker.files, app.settings().aligned, true);
      if (!person) return;
      changed = true;
      await load();
      body.querySelector("h3").focus();
      return `${name} has ${count(person.images)} now.${warningsOf(person)}`;
    }, "Adding…");
    button.disabled = false;
  }

  function address() {
    return `people/${encodeURIComponent(name)}`;
  }
}
