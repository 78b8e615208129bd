// Enrol, list, delete.

import { call } from "./api.js";
import { confirm, make, say } from "./dom.js";
import { Picker } from "./picker.js";
import { portrait } from "./portrait.js";

const PAGE = 50;

export function startPeople(panel, app) {
  const form = panel.querySelector("[data-enrol]");
  const line = form.querySelector("[data-message]");
  const name = form.querySelector("input[name=name]");
  const list = panel.querySelector("[data-list]");
  const more = panel.querySelector("[data-more]");
  const picker = new Picker(form.querySelector("[data-picker]"), () => say(line, ""));
  let next = 0;

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const who = name.value.trim();
    if (!who) return missing("Give a name.", name);
    if (!picker.files.length) return missing("Choose at least one picture.", picker.input);
    await enrol(who);
  });
  more.addEventListener("click", () => load(next));

  function missing(text, control) {
    say(line, text, "error");
    control.focus();
  }

  async function enrol(who) {
    const button = form.querySelector("[type=submit]");
    const { aligned } = app.settings();
    const pictures = { images: picker.files, aligned };
    button.disabled = true;
    say(line, "Enrolling…", "busy");
    try {
      let person;
      try {
        person = await call("POST", "people", { name: who, ...pictures });
      } catch (error) {
        if (error.code !== "exists") throw error;
        if (!(await confirm(`${who} is enrolled already. Add the pictures?`, "Add"))) return say(line, "");
        person = await call("POST", `people/${encodeURIComponent(who)}/pictures`, pictures);
      }
      form.reset();
      picker.clear();
      say(line, `${person.name} is enrolled with ${count(person.pictures)}.`, "done");
      name.focus();
      await changed();
    } catch (error) {
      say(line, error.message, "error");
    } finally {
      button.disabled = false;
    }
  }

  async function remove(person) {
    if (!(await confirm(`Delete ${person.name} and ${count(person.pictures)} from the gallery?`, "Delete"))) return;
    try {
      await call("DELETE", `people/${encodeURIComponent(person.name)}`);
      say(line, `${person.name} was deleted.`, "done");
      await changed();
      (list.querySelector("button") ?? name).focus();
    } catch (error) {
      say(line, error.message, "error");
    }
  }

  async function changed() {
    await load(0);
    app.peopleChanged();
  }

  async function load(offset) {
    try {
      const page = await call("GET", `people?offset=${offset}&limit=${PAGE}`);
      if (offset === 0) list.replaceChildren();
      list.append(...page.people.map(row));
      next = page.next;
      more.hidden = next === null;
      panel.querySelector("[data-count]").textContent = page.total.toLocaleString("en");
      panel.querySelector("[data-empty]").hidden = page.total > 0;
    } catch (error) {
      say(line, error.message, "error");
    }
  }

  function row(person) {
    const button = make("button", { type: "button", className: "danger", textContent: "Delete" });
    button.setAttribute("aria-label", `Delete ${person.name}`);
    button.addEventListener("click", () => remove(person));
    return make(
      "li",
      {},
      portrait(person),
      make(
        "div",
        { className: "who" },
        make("div", { className: "name", textContent: person.name }),
        make("div", { className: "hint", textContent: count(person.pictures) }),
      ),
      button,
    );
  }

  return load(0);
}

const count = (pictures) => (pictures === 1 ? "1 picture" : `${pictures.toLocaleString("en")} pictures`);
