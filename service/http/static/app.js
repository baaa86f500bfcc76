/** The page to try the model: connects the ways in which pictures arrive, the queue of requests, and what is shown. */

import { offerCamera } from "./camera.js";
import { detailOf } from "./detail.js";
import { byId } from "./elements.js";
import { bytes, counted, duration } from "./format.js";
import { Gallery } from "./gallery.js";
import { listenForPictures } from "./intake.js";
import { showFacts, showSamples } from "./model.js";
import { Queue } from "./queue.js";
import { Server } from "./server.js";
import { askForToken } from "./token.js";

// A progress bar that vanishes at once would only flicker.
const PROGRESS_AFTER_MS = 300;

const server = new Server(askForToken);
const queue = new Queue(server, { onChange, onPause, onResume: showProgress, onEnd });
const gallery = new Gallery(byId("tiles"), showDetail);
let model = null;
/** The pictures that were added since the queue was last empty; null if it is empty. */
let run = null;

function classify(files) {
  const pictures = files.map((file) => ({
    file, url: URL.createObjectURL(file), state: "waiting", classes: null, pixels: null, error: null, model: null,
    seconds: null, shared: 0,
  }));
  gallery.add(pictures);
  send(pictures);
}

function send(pictures) {
  run ??= { pictures: [], done: 0, start: performance.now(), timer: setTimeout(revealProgress, PROGRESS_AFTER_MS) };
  run.pictures.push(...pictures);
  byId("results").hidden = false;
  if (run.pictures.length > 1) say(`Classifying ${counted(run.pictures.length, "picture")}`);
  gallery.select(pictures[0]);
  bringAnswerIntoView();
  showProgress();
  queue.add(pictures);
}

function onChange(picture) {
  run.done += 1;
  gallery.update(picture);
  if (gallery.selected === picture) showDetail(picture);
  if (picture.model && model && picture.model.version !== model.version) loadModel(); // a new export is served
  showProgress();
}

function onEnd() {
  if (!run) return;
  const { pictures, start, timer } = run;
  clearTimeout(timer);
  run = null;
  hideProgress();
  const summary = summaryOf(gallery.pictures);
  if (pictures.length === 1) {
    byId("summary").textContent = summary;
    say(spoken(pictures[0]));
  } else {
    const took = duration((performance.now() - start) / 1000);
    const all = pictures.length === gallery.pictures.length;
    byId("summary").textContent = all ? `${summary}, in ${took}` : `${summary}; the last ${pictures.length} in ${took}`;
    say(`${summaryOf(pictures)}, in ${took}`);
  }
  offerRetry();
}

function offerRetry() {
  byId("retry").hidden = !gallery.pictures.some(({ state }) => state === "failed");
}

function spoken({ file, state, classes, error }) {
  if (state === "classified") return `${file.name}: ${classes[0].name}, ${Math.round(100 * classes[0].probability)} percent`;
  return `${file.name}: ${error}`;
}

function summaryOf(pictures) {
  const number = (wanted) => pictures.filter(({ state }) => state === wanted).length;
  const parts = [[number("classified"), "classified"], [number("rejected"), "not readable"], [number("failed"), "without an answer"]];
  return parts.filter(([some]) => some).map(([some, what]) => `${some} ${what}`).join(", ");
}

function showDetail(picture) {
  byId("empty").hidden = true;
  byId("detail").hidden = false;
  byId("detail").replaceChildren(...detailOf(picture, model?.classes ?? []));
}

function showNothing() {
  byId("detail").hidden = true;
  byId("detail").replaceChildren();
  byId("empty").hidden = false;
}

/** On narrow screens the answer is below the pictures. */
function bringAnswerIntoView() {
  if (matchMedia("(max-width: 55rem)").matches) byId("answer").scrollIntoView({ block: "start" });
}

function revealProgress() {
  byId("progress").hidden = false;
  byId("summary").textContent = "";
}

function showProgress() {
  if (!run) return;
  byId("bar").max = run.pictures.length;
  byId("bar").value = run.done;
  byId("progress-text").textContent = `${run.done} of ${counted(run.pictures.length, "picture")}`;
}

function onPause(seconds, reason) {
  const text = `Waiting ${duration(seconds)}, then asking again: ${reason}`;
  revealProgress();
  byId("progress-text").textContent = text;
  say(text);
}

function hideProgress() {
  const hadFocus = byId("progress").contains(document.activeElement);
  byId("progress").hidden = true;
  if (hadFocus) byId("clear").focus();
}

function cancel() {
  queue.cancel();
  const unfinished = gallery.pictures.filter(({ state }) => state === "waiting");
  const total = run?.pictures.length ?? 0;
  if (run) clearTimeout(run.timer);
  run = null;
  forget(unfinished);
  hideProgress();
  offerRetry();
  byId("summary").textContent = summaryOf(gallery.pictures);
  say(`Cancelled: ${total - unfinished.length} of ${counted(total, "picture")} have an answer`);
}

function forget(pictures) {
  for (const { url } of pictures) URL.revokeObjectURL(url);
  gallery.remove(pictures);
  const [first] = gallery.pictures;
  byId("results").hidden = !first;
  if (!first) showNothing();
  else if (!gallery.selected) gallery.select(first);
}

function clear() {
  if (run) cancel();
  forget(gallery.pictures);
  offerRetry();
  byId("summary").textContent = "";
  byId("choose").focus();
  say("All pictures were removed from the page");
}

function tryAgain() {
  const failed = gallery.pictures.filter(({ state }) => state === "failed");
  for (const picture of failed) {
    Object.assign(picture, { state: "waiting", error: null });
    gallery.update(picture);
  }
  byId("retry").hidden = true;
  byId("clear").focus();
  if (failed.length) send(failed);
}

async function loadModel() {
  try {
    model = await server.model();
  } catch (error) {
    complain(error.message, loadModel);
    return;
  }
  byId("notice").hidden = true;
  queue.limits = model.limits;
  showFacts(model);
  byId("limits").textContent = `PNG, JPEG, WebP, GIF or BMP, up to ${bytes(model.limits.max_image_bytes)} each`;
  showSamples(model.samples, classifySamples);
}

async function classifySamples(names) {
  try {
    classify(await Promise.all(names.map((name) => server.sample(name))));
  } catch (error) {
    complain(error.message, () => classifySamples(names));
  }
}

/** Shows a problem of the page as a whole, with a button that tries again. */
function complain(message, again) {
  byId("notice-text").textContent = message;
  byId("notice-action").onclick = () => {
    byId("notice").hidden = true;
    again();
  };
  byId("notice").hidden = false;
}

/** Lets screen readers say something. */
function say(text) {
  byId("status").textContent = text;
}

listenForPictures(classify, say);
offerCamera((photo) => classify([photo]));
byId("tiles").addEventListener("choose", bringAnswerIntoView);
byId("cancel").addEventListener("click", cancel);
byId("clear").addEventListener("click", clear);
byId("retry").addEventListener("click", tryAgain);
loadModel();
