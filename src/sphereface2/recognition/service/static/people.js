// Enrol, list, filter, delete.

import { call } from "./api.js";
import { confirm, count, make, say } from "./dom.js";
import { enrol, warningsOf } from "./enrol.js";
import { showPerson } from "./person.js";
import { Picker } from "./picker.js";
import { portrait } from "./portrait.js";

// People on a page; milliseconds after the last letter of the filter until it is asked for.
const [PAGE, TYPING] = [50, 250];

export function startPeople(panel, app) {
  const form = panel.querySelector("[data-enrol]");
  const line = form.querySelector("[data-message]");
  const name = form.querySelector("input[name=name]");
  const list = panel.querySelector("[data-list]");
  const empty = panel.querySelector("[data-empty]");
  const more = panel.querySelector("[data-more]");
  const filter = panel.querySelector("[data-filter]");
  const heading = panel.querySelector("[data-heading]");
  const picker = new Picker(form.querySelector("[data-picker]"), () => say(line, ""));
  let next = 0;
  let total = 0;
  let latest = 0;
  let typing = 0;

  filter.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => load(0), TYPING);
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const who = name.value.trim();
    if (!who) return missing("Give a name.", name);
    if (!picker.files.length) return missing("Choose at least one image.", picker.input);
    await add(who);
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

  async function add(who) {
    const button = form.querySelector("[type=submit]");
    button.disabled = true;
    say(line, "Enrolling…", "busy");
    try {
      const person = await enrol(who, picker.files, app.settings().aligned);
      if (!person) return say(line, "");
      form.reset();
      picker.clear();
      say(line, `${person.name} is enrolled with ${count(person.images)}.${warningsOf(person)}`, "done");
      name.focus();
      filter.value = "";
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
    empty.hidden = total > 0;
    empty.textContent = filter.value.trim() ? "Nobody of that name." : "Nobody yet.";
  }

  async function load(offset) {
    const mine = ++latest;
    more.setAttribute("aria-disabled", true); // `disabled` would take the focus away
    try {
      const page = await call("GET", `people?${new URLSearchParams({ offset, limit: PAGE, query: filter.value.trim() })}`);
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
    const button = make("button", { type: "button", className: "danger", textContent: "Delete", "aria-label": `Delete ${person.name}` });
    const open = make("button", { type: "button", className: "name", textContent: person.name });
    open.setAttribute("aria-haspopup", "dialog");
    open.addEventListener("click", async () => {
      if (!(await showPerson(person.name, app))) return;
      await load(0);
      heading.focus();
      app.peopleChanged();
    });
    const item = make(
      "li",
      { tabIndex: -1 },
      portrait(person),
      make(
        "div",
        { className: "who" },
        open,
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
