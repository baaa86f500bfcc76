/** Takes a photo: with the camera app on phones and tablets, with a dialog on other computers. */

import { byId } from "./elements.js";

const PROBLEMS = {
  NotAllowedError: "The browser does not allow this page to use the camera. Allow it in the browser's settings of this page.",
  NotFoundError: "There is no camera.",
  NotReadableError: "The camera cannot be used: another program may be using it.",
};

/** @param {(file: File) => void} onPhoto */
export function offerCamera(onPhoto) {
  const button = byId("photograph");
  const onPhone = matchMedia("(pointer: coarse)").matches;
  // Browsers offer the camera only to pages that are loaded over TLS or from this computer.
  button.hidden = !onPhone && !navigator.mediaDevices?.getUserMedia;
  button.addEventListener("click", () => (onPhone ? byId("capture").click() : photograph(onPhoto)));
}

async function photograph(onPhoto) {
  const dialog = byId("camera-dialog");
  const video = byId("camera-video");
  const take = byId("camera-take");
  const listeners = new AbortController();
  const stop = () => {
    listeners.abort();
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  };
  byId("camera-problem").textContent = "";
  take.disabled = true;
  dialog.addEventListener("close", stop, { signal: listeners.signal });
  byId("camera-close").addEventListener("click", () => dialog.close(), { signal: listeners.signal });
  take.addEventListener("click", async () => {
    const photo = await frameOf(video);
    dialog.close();
    onPhoto(photo);
  }, { signal: listeners.signal });
  dialog.showModal();
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    video.srcObject = stream;
    if (listeners.signal.aborted) return stop(); // closed while the browser asked the user
    await video.play();
    take.disabled = false;
    take.focus();
  } catch (error) {
    if (listeners.signal.aborted) return undefined;
    byId("camera-problem").textContent = PROBLEMS[error.name] ?? `The camera cannot be used: ${error.message}`;
  }
  return undefined;
}

/** The frame that a video shows now, as a JPEG file. */
async function frameOf(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  return new File([blob], "photo.jpg", { type: "image/jpeg" });
}
