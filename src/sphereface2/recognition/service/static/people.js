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
  const heading = panel.querySelector("[data-heading]");
  const picker = new Picker(form.querySelector("[data-picker]"), () => say(line, ""));
  let next = 0;
  let total = 0;
  let latest = 0;

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const who = name.value.trim();
    if (!who) return missing("Give a name.", name);
    if (!picker.files.length) return missing("Choose at least one image.", picker.input);
    await enrol(who);
  });
  more.addEventListener("click", async () => {
    if (loading()) return; // a double click
    const before = list.children.length;
    await load(next);
    list.children[before]?.focus(); // else the focus would be lost with the button
  });

  function missing(text, control) {
    say(line, text, "error");
    control.focus();
  }

  async function enrol(who) {
    const button = form.querySelector("[type=submit]");
    const { aligned } = app.settings();
    const images = { images: picker.files, aligned };
    button.disabled = true;
    say(line, "Enrolling…", "busy");
    try {
      let address = "people";
      let fields = { name: who, ...images };
      let person = null;
      while (!person) {
        try {
          person = await call("POST", address, fields);
        } catch (error) {
          if (error.code === "exists") {
            if (!(await confirm(`${who} is enrolled already. Add the images?`, "Add"))) return say(line, "");
            address = `people/${encodeURIComponent(who)}/images`;
            delete fields.name;
          } else if (error.code === "several_faces") {
            if (!(await confirm(`${error.message} Take the largest face?`, "Take the largest"))) return say(line, "");
            fields.faces = "largest";
          } else throw error;
        }
      }
      form.reset();
      picker.clear();
      const warnings = person.warnings.map((warning) => ` Poor image: ${warning}.`);
      say(line, `${person.name} is enrolled with ${count(person.images)}.${warnings.join("")}`, "done");
      name.focus();
      await load(0);
      app.peopleChanged();
    } catch (error) {
      say(line, error.message, "error");
    } finally {
      button.disabled = false;
    }
  }

  async function remove(person, item) {
    if (!(await confirm(`Delete ${person.name} and ${count(person.images)} from the gallery?`, "Delete"))) return;
    try {
      await call("DELETE", `people/${encodeURIComponent(person.name)}`);
      say(line, `${person.name} was deleted.`, "done");
      await leave(item);
      app.peopleChanged();
    } catch (error) {
      say(line, error.message, "error");
    }
  }

  /** Takes a row away where it stands. The focus goes to a row beside it, never to its button. */
  async function leave(item) {
    if (!item.isConnected) return load(0); // the list was loaded anew, with or without the person
    const focused = item.contains(document.activeElement) || document.activeElement === document.body;
    const beside = item.nextElementSibling ?? item.previousElementSibling ?? heading;
    item.remove();
    showTotal(total - 1);
    if (next !== null) next -= 1; // whoever comes after has moved up
    if (focused) beside.focus();
    // A page under way may have been counted with or without the row.
    if (loading() || (!list.children.length && next !== null)) await load(0);
  }

  const loading = () => more.getAttribute("aria-disabled") === "true";

  function showTotal(number) {
    total = number;
    panel.querySelector("[data-count]").textContent = total.toLocaleString("en");
    panel.querySelector("[data-empty]").hidden = total > 0;
  }

  async function load(offset) {
    const mine = ++latest;
    more.setAttribute("aria-disabled", true); // `disabled` would take the focus away
    try {
      const page = await call("GET", `people?offset=${offset}&limit=${PAGE}`);
      if (mine !== latest) return;
      if (offset === 0) list.replaceChildren();
      list.append(...page.people.map(row));
      next = page.next;
      more.hidden = next === null;
      showTotal(page.total);
    } catch (error) {
      if (mine === latest) say(line, error.message, "error");
    } finally {
      if (mine === latest) more.removeAttribute("aria-disabled");
    }
  }

  function row(person) {
    const button = make("button", { type: "button", className: "danger", textContent: "Delete" });
    button.setAttribute("aria-label", `Delete ${person.name}`);
    const item = make(
      "li",
      { tabIndex: -1 },
      portrait(person),
      make(
        "div",
        { className: "who" },
        make("div", { className: "name", textContent: person.name }),
        make("div", { className: "hint", textContent: count(person.images) }),
      ),
      button,
    );
    button.addEventListener("click", () => remove(person, item));
    return item;
  }

  load(0);
  return (files) => picker.take(files);
}

const count = (images) => (images === 1 ? "1 image" : `${images.toLocaleString("en")} images`);
