/** The list of pictures, as a listbox: one tab stop, arrow keys, one picture selected. */

import { element } from "./elements.js";
import { percent } from "./format.js";

export class Gallery {
  #list;
  #onSelect;
  #tiles = new Map();
  #selected = null;

  /**
   * @param {HTMLElement} list The element with the role listbox.
   * @param {(picture: import("./queue.js").Picture) => void} onSelect
   */
  constructor(list, onSelect) {
    this.#list = list;
    this.#onSelect = onSelect;
    list.addEventListener("click", (event) => this.#choose(event.target.closest("[role=option]")));
    list.addEventListener("keydown", (event) => this.#onKey(event));
  }

  get selected() {
    return this.#selected;
  }

  get pictures() {
    return [...this.#tiles.keys()];
  }

  /** @param {import("./queue.js").Picture[]} pictures */
  add(pictures) {
    const added = document.createDocumentFragment();
    for (const picture of pictures) {
      const image = element("img", { alt: "", loading: "lazy", decoding: "async", src: picture.url });
      image.addEventListener("error", () => image.replaceWith(element("span", { class: "no-image" }, "?")));
      const tile = element("li", { role: "option", tabindex: "-1", class: "tile", "aria-selected": "false" });
      tile.append(element("span", { class: "thumb" }, image), element("span", { class: "label" }), element("span", { class: "value" }));
      tile.picture = picture;
      this.#tiles.set(picture, tile);
      this.update(picture);
      added.append(tile);
    }
    this.#list.append(added);
  }

  /** Shows the state of a picture. */
  update(picture) {
    const tile = this.#tiles.get(picture);
    if (!tile) return;
    const best = picture.classes?.[0];
    const text = { waiting: "waiting", classified: best?.name, rejected: "not readable", failed: "no answer" }[picture.state];
    const share = best ? percent(best.probability, 0) : "";
    tile.dataset.state = picture.state;
    tile.querySelector(".label").textContent = text;
    tile.querySelector(".value").textContent = share;
    tile.setAttribute("aria-label", `${picture.file.name}: ${[text, share].filter(Boolean).join(", ")}`);
    tile.title = picture.file.name;
  }

  /** @param {Iterable<import("./queue.js").Picture>} pictures */
  remove(pictures) {
    for (const picture of pictures) {
      this.#tiles.get(picture)?.remove();
      this.#tiles.delete(picture);
      if (this.#selected === picture) this.#selected = null;
    }
  }

  /** Selects a picture without moving the focus. */
  select(picture) {
    const before = this.#tiles.get(this.#selected);
    before?.setAttribute("aria-selected", "false");
    before?.setAttribute("tabindex", "-1");
    const tile = this.#tiles.get(picture);
    tile.setAttribute("aria-selected", "true");
    tile.setAttribute("tabindex", "0");
    this.#selected = picture;
    this.#onSelect(picture);
  }

  #choose(tile) {
    if (!tile) return;
    tile.focus();
    this.select(tile.picture);
    this.#list.dispatchEvent(new CustomEvent("choose"));
  }

  #onKey(event) {
    const tile = event.target.closest("[role=option]");
    if (!tile || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = {
      ArrowRight: () => tile.nextElementSibling,
      ArrowLeft: () => tile.previousElementSibling,
      ArrowDown: () => this.#inNextRow(tile, 1),
      ArrowUp: () => this.#inNextRow(tile, -1),
      Home: () => this.#list.firstElementChild,
      End: () => this.#list.lastElementChild,
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const target = to();
    if (!target) return;
    target.focus();
    this.select(target.picture);
  }

  /** The tile in the same column of the next or previous row. */
  #inNextRow(tile, step) {
    const tiles = [...this.#list.children];
    const columns = getComputedStyle(this.#list).gridTemplateColumns.split(" ").length;
    return tiles[tiles.indexOf(tile) + step * columns] ?? null;
  }
}
