// Requests to the server this page came from, and to no other.

let asking = null;

/** A refused request: `code` for programs, the message for people. */
export class ApiError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** Send a request; JSON, a blob or nothing comes back. Asks for a key when one is needed. */
export async function call(method, path, fields = null) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    let response;
    try {
      response = await fetch(`/v1/${path}`, { method, headers, body: fields && form(fields) });
    } catch {
      throw new ApiError("offline", "The server does not answer. Is it still running?");
    }
    if (response.status === 401) {
      if (sessionStorage.getItem("key") === key) sessionStorage.removeItem("key");
      await askForKey();
      continue;
    }
    const type = response.headers.get("content-type") ?? "";
    const content = type.includes("json") ? await response.json() : await response.blob();
    if (!response.ok) throw new ApiError(content.code, sentence(content.error));
    return content;
  }
}

function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one != null && one !== "") data.append(name, one);
    }
  }
  return data;
}

function askForKey() {
  if (sessionStorage.getItem("key")) return Promise.resolve();
  asking ??= new Promise((resolve) => {
    const dialog = document.querySelector("#key");
    const input = dialog.querySelector("input");
    input.value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.showModal();
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("key", input.value.trim());
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

function sentence(text) {
  const whole = text ? text[0].toUpperCase() + text.slice(1) : "The server refused the request";
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}
