// Starts the page: tabs, settings, then one module a tab.

import { call } from "./api.js";
import { make, oneIn } from "./dom.js";
import { startPeople } from "./people.js";
import { startSearch } from "./search.js";
import { startVerify } from "./verify.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const aligned = document.querySelector("#aligned");
const faces = document.querySelector("#faces");
const far = document.querySelector("#far");
const settings = new EventTarget();
const app = {
  model: null,
  settings: () => ({ aligned: aligned.checked, faces: faces.checked ? "all" : "largest", far: far.value }),
  onSettings: (listener) => settings.addEventListener("settings", () => listener()),
  onPeople: (listener) => settings.addEventListener("people", () => listener()),
  peopleChanged: () => settings.dispatchEvent(new Event("people")),
};

function select(tab, focus = false) {
  for (const one of tabs) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", chosen);
    one.tabIndex = chosen ? 0 : -1;
    document.getElementById(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (focus) tab.focus();
}

function startTabs() {
  const keys = { ArrowRight: 1, ArrowLeft: -1 };
  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { Home: 0, End: tabs.length - 1 }[event.key] ?? at + (keys[event.key] ?? NaN);
      if (Number.isNaN(to)) return;
      event.preventDefault();
      select(tabs[(to + tabs.length) % tabs.length], true);
    });
  });
  select(tabs.find((tab) => location.hash === `#${tab.getAttribute("aria-controls")}`) ?? tabs[0]);
}

async function showModel() {
  const model = (app.model = await call("GET", "model"));
  const state = model.calibrated ? "calibrated" : "not calibrated";
  document.querySelector("#model").textContent = `Model ${model.model.slice(0, 8)}, ${state}`;
  const storage = document.querySelector("[data-storage]");
  storage.textContent = model.keeps_crops
    ? "The aligned faces are kept as thumbnails; the images are not."
    : "Embeddings are kept; no image is.";
  if (model.quality === "refuse") storage.textContent += " Small, blurred or turned faces are refused.";
  if (!model.calibrated) return;
  far.disabled = false;
  far.replaceChildren(
    ...model.operating.map((one) =>
      make("option", { value: one.far, textContent: oneIn(one.far), selected: one.far === model.far }),
    ),
  );
}

for (const control of [aligned, faces, far]) {
  control.addEventListener("change", () => settings.dispatchEvent(new Event("settings")));
}
const forget = document.querySelector("#forget");
const showForget = () => (forget.hidden = !sessionStorage.getItem("key"));
forget.addEventListener("click", () => {
  sessionStorage.removeItem("key");
  location.reload();
});
// An image dropped beside its place must not take the page away.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());

startTabs();
showForget();
const takers = {
  verify: startVerify(document.querySelector("#verify"), app),
  search: startSearch(document.querySelector("#search"), app),
  people: startPeople(document.querySelector("#people"), app),
};
// An image pasted wherever the focus is goes to the tab that is seen.
document.addEventListener("paste", (event) => {
  const { files } = event.clipboardData;
  if (!files.length || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  const seen = tabs.find((tab) => tab.getAttribute("aria-selected") === "true");
  takers[seen.getAttribute("aria-controls")](files);
});
try {
  await showModel();
} catch (error) {
  document.querySelector("#model").textContent = error.message;
} finally {
  showForget();
}
