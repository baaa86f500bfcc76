/** The ways in which pictures reach the page: drop, paste, file chooser, camera. */

import { byId } from "./elements.js";

/**
 * @param {(files: File[]) => void} onFiles Gets at least one file.
 * @param {(text: string) => void} onNothing Says why there was no file in what the user gave.
 */
export function listenForPictures(onFiles, onNothing) {
  const give = (files, reason) => (files.length ? onFiles(files) : onNothing(reason));
  listenForChoice(byId("choose"), byId("files"), onFiles);
  byId("capture").addEventListener("change", ({ target }) => takeFrom(target, onFiles));
  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("input[type=password]")) return;
    event.preventDefault();
    give([...event.clipboardData.files], "There is no picture in the clipboard.");
  });
  listenForDrops(async (items, files) => give(await droppedFiles(items, files), "There is no picture in what you dropped."));
}

function listenForChoice(button, input, onFiles) {
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => takeFrom(input, onFiles));
}

function takeFrom(input, onFiles) {
  const files = [...input.files];
  input.value = ""; // so that the same file can be chosen again
  if (files.length) onFiles(files);
}

/** The whole page accepts drops: a browser would otherwise open a file that misses the marked area. */
function listenForDrops(onDrop) {
  let depth = 0; // dragenter and dragleave are sent for every element under the pointer
  const show = () => document.documentElement.classList.toggle("dragging", depth > 0);
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth += 1;
    show();
  });
  addEventListener("dragleave", (event) => {
    if (!hasFiles(event)) return;
    depth = Math.max(0, depth - 1);
    show();
  });
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    show();
    onDrop([...event.dataTransfer.items], [...event.dataTransfer.files]);
  });
}

/** The dropped files; of dropped folders the pictures in them, at any depth. */
async function droppedFiles(items, files) {
  // The entries must be taken before the first await: the browser empties the list after the event.
  const entries = items.filter(({ kind }) => kind === "file").map((item) => item.webkitGetAsEntry?.() ?? null);
  if (!entries.some((entry) => entry?.isDirectory)) return files;
  const found = await Promise.all(entries.map((entry) => (entry ? filesIn(entry, false) : [])));
  return found.flat();
}

async function filesIn(entry, onlyPictures) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject)).catch(() => null);
    return file && (!onlyPictures || file.type.startsWith("image/")) ? [file] : [];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)).catch(() => []);
    if (!some.length) break; // a browser hands out about a hundred entries at a time
    for (const child of some) found.push(...await filesIn(child, true));
  }
  return found;
}
