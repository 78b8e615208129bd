// Requests to the server this page came from, and to no other.

// A request that came too soon after others is sent again so many times, after so many seconds.
const [PATIENCE, LONGEST_WAIT] = [3, 5];

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
  for (let refused = 0; ; ) {
    const key = sessionStorage.getItem("key");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (!sendable(headers)) {
      sessionStorage.removeItem("key");
      await askForKey();
      continue;
    }
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
    const wait = Number(response.headers.get("retry-after") ?? 1);
    if (response.status === 429 && wait <= LONGEST_WAIT && refused++ < PATIENCE) {
      await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
      continue;
    }
    const type = response.headers.get("content-type") ?? "";
    const content = type.includes("json") ? await response.json() : await response.blob();
    if (!response.ok) throw new ApiError(content.code, sentence(content.error));
    return content;
  }
}

/** Whether a browser takes these headers: of characters beyond Latin-1 `fetch` makes an exception. */
function sendable(headers) {
  try {
    return Boolean(new Headers(headers));
  } catch {
    return false;
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
      // Chats and documents add what nobody sees: spaces without width, marks of direction.
      sessionStorage.setItem("key", input.value.replace(/[^\x21-\x7e]/g, ""));
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
