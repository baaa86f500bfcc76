/** What the page shows of the model, and the server's sample pictures. */

import { byId, element } from "./elements.js";
import { counted, percent } from "./format.js";

// So that a model with many classes does not fill the page with their names.
const CLASSES_NAMED = 12;
const LIST = new Intl.ListFormat("en-GB"); // no comma before "and"

/** @param {object} model The answer of /v1/model. */
export function showFacts(model) {
  byId("fact-accuracy").closest("div").hidden = model.accuracy === null;
  if (model.accuracy !== null) byId("fact-accuracy").textContent = percent(model.accuracy, 2);
  byId("fact-name").textContent = model.name;
  byId("fact-version").textContent = model.version;
  byId("fact-variant").textContent = model.variant;
  byId("fact-device").textContent = `on ${model.device}`;
  byId("facts").removeAttribute("aria-busy");
  const named = model.classes.slice(0, CLASSES_NAMED);
  if (model.classes.length > named.length) named.push(`${model.classes.length - named.length} more`);
  byId("class-list").textContent = `${counted(model.classes.length, "class", "classes")}: ${LIST.format(named)}`;
}

/**
 * @param {string[]} names File names of the sample pictures.
 * @param {(names: string[]) => void} onChoose
 */
export function showSamples(names, onChoose) {
  const shown = names.join("/");
  if (byId("samples").dataset.names === shown) return; // keeps the focus when only the model has changed
  byId("samples").dataset.names = shown;
  const buttons = names.map((name) => {
    const label = name.replace(/\.\w+$/, "");
    const image = element("img", { src: `samples/${encodeURIComponent(name)}`, alt: "", decoding: "async" });
    const button = element("button", { type: "button", class: "sample" }, element("span", { class: "thumb" }, image), label);
    button.addEventListener("click", () => onChoose([name]));
    return button;
  });
  byId("all-samples").textContent = `Classify all ${names.length}`;
  byId("all-samples").onclick = () => onChoose(names);
  byId("samples").replaceChildren(...buttons.map((button) => element("li", {}, button)));
  byId("samples-part").hidden = !names.length;
}
