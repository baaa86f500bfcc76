/** The answer for one picture: the picture, what the network sees of it, and a bar for each class. */

import { element, pixelCanvas } from "./elements.js";
import { bytes, counted, duration, percent } from "./format.js";

const IMAGE_SIZE = 32;

/**
 * @param {import("./queue.js").Picture} picture
 * @param {string[]} classes Names of the model's classes: rows without a bar, while the answer is awaited.
 * @returns {Node[]} The content of the detail.
 */
export function detailOf(picture, classes) {
  const figures = element("div", { class: "figures" }, originalFigure(picture));
  if (picture.pixels) figures.append(pixelFigure(picture));
  if (picture.state !== "waiting") return [heading(picture), figures, ...answer(picture), facts(picture)];
  figures.append(element("figure", {}, element("div", { class: "frame loading" }), element("figcaption", {}, "\u00a0")));
  return [heading(picture), figures, waitingBars(classes)];
}

const answer = ({ classes }) => (classes ? [bars(classes)] : []);

function heading(picture) {
  const name = element("p", { class: "file-name" }, picture.file.name);
  if (picture.state === "waiting") {
    const title = element("h2", { class: "loading-text" }, "Classifying…");
    return element("div", { class: "verdict" }, name, title);
  }
  if (picture.classes) {
    const [best] = picture.classes;
    const title = element("h2", {}, best.name, " ");
    title.append(element("span", { class: "share" }, percent(best.probability)));
    return element("div", { class: "verdict" }, name, title);
  }
  const title = picture.state === "rejected" ? "This file cannot be classified" : "There is no answer yet";
  const verdict = element("div", { class: "verdict error" }, name, element("h2", {}, title));
  verdict.append(element("p", { class: "error-text" }, picture.error));
  return verdict;
}

function originalFigure(picture) {
  const image = element("img", { alt: `Your picture ${picture.file.name}`, decoding: "async", src: picture.url });
  const shot = element("div", { class: "shot" }, image);
  const frame = element("div", { class: "frame" }, shot);
  const caption = element("figcaption", {}, "Your picture");
  image.addEventListener("error", () => {
    frame.replaceChildren(element("p", { class: "hint" }, "The browser cannot show this file."));
  });
  image.addEventListener("load", () => {
    const { naturalWidth: width, naturalHeight: height } = image;
    if (width === height || !width || !height) return;
    shot.classList.add(width > height ? "wide" : "tall");
    shot.style.setProperty("aspect-ratio", `${width} / ${height}`);
    if (!picture.classes) return;
    shot.append(element("div", { class: "crop", "aria-hidden": "true" }));
    caption.textContent = "Your picture, and the square that is used";
  });
  return element("figure", {}, frame, caption);
}

function pixelFigure(picture) {
  const label = `The ${IMAGE_SIZE} by ${IMAGE_SIZE} pixels that the network sees of ${picture.file.name}`;
  const frame = element("div", { class: "frame" }, pixelCanvas(picture.pixels, IMAGE_SIZE, label));
  return element("figure", {}, frame, element("figcaption", {}, `What the network sees: ${IMAGE_SIZE}\u00a0×\u00a0${IMAGE_SIZE} pixels`));
}

function bars(classes) {
  const list = element("ol", { class: "bars", "aria-label": "Probability of each class" });
  for (const { name, probability } of classes) {
    const fill = element("span", { class: "fill" });
    fill.style.setProperty("width", `${100 * probability}%`);
    const track = element("span", { class: "track", "aria-hidden": "true" }, fill);
    const value = element("span", { class: "value" }, percent(probability));
    list.append(element("li", {}, element("span", { class: "name" }, name), " ", track, value));
  }
  return list;
}

function waitingBars(classes) {
  const rows = classes.map((name) => {
    return element("li", {}, element("span", { class: "name" }, name), element("span", { class: "track" }));
  });
  return element("ol", { class: "bars loading", "aria-hidden": "true" }, ...rows);
}

function facts(picture) {
  const rows = [];
  if (picture.seconds !== null && picture.classes) {
    const others = picture.shared > 1 ? ` for a request of ${counted(picture.shared, "picture")}` : "";
    rows.push(["Time in the server", duration(picture.seconds) + others]);
  }
  if (picture.model && picture.classes) rows.push(["Answered by", `${picture.model.version} (${picture.model.variant})`]);
  rows.push(["File", bytes(picture.file.size)]);
  const list = element("dl", { class: "small-facts" });
  for (const [term, text] of rows) list.append(element("div", {}, element("dt", {}, term), element("dd", {}, text)));
  return list;
}
