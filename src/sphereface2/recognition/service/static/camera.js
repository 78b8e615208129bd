// One image from the camera, or null.

import { say } from "./dom.js";

const QUALITY = 0.95;

export async function takePhotograph() {
  const dialog = document.querySelector("#camera");
  const video = dialog.querySelector("video");
  const line = dialog.querySelector(".message");
  const take = dialog.querySelector("[data-take]");
  const cancel = dialog.querySelector("[data-cancel]");
  let stream = null;
  take.disabled = true;
  say(line, "Waiting for the camera…", "busy");
  dialog.showModal();

  const done = new Promise((resolve) => {
    take.onclick = async () => {
      const canvas = document.createElement("canvas");
      canvas.width = video.videoWidth;
      canvas.height = video.videoHeight;
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => {
        resolve(blob && new File([blob], "camera.jpg", { type: "image/jpeg" }));
        dialog.close();
      }, "image/jpeg", QUALITY);
    };
    cancel.onclick = () => dialog.close();
    dialog.addEventListener("close", () => resolve(null), { once: true });
  });

  start();
  const image = await done;
  stream?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  return image;

  async function start() {
    try {
      if (!navigator.mediaDevices) throw new DOMException("", "NotSupportedError");
      const got = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
      if (!dialog.open) {
        got.getTracks().forEach((track) => track.stop());
        return;
      }
      stream = got;
      video.srcObject = stream;
      await video.play();
      say(line, "");
      take.disabled = false;
      take.focus();
    } catch (error) {
      say(line, reason(error.name), "error");
    }
  }
}

function reason(name) {
  switch (name) {
    case "NotAllowedError": return "The browser was not allowed to use the camera.";
    case "NotFoundError": return "No camera was found.";
    case "NotSupportedError": return "Browsers open the camera only over HTTPS or on localhost.";
    default: return "The camera could not be opened.";
  }
}
