/** Makes elements. Everything that comes from files or from the server is set as text, never as HTML. */

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * @param {string} tag
 * @param {object} attributes Attributes; the key `class` too.
 * @param {...(Node|string)} children
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Draws pixels at their size; the style sheet enlarges the canvas without smoothing. */
export function pixelCanvas(base64, size, label) {
  const canvas = element("canvas", { role: "img", "aria-label": label, width: size, height: size });
  const rgb = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const image = new ImageData(size, size);
  for (let pixel = 0; pixel < size * size; pixel += 1) {
    image.data.set(rgb.subarray(3 * pixel, 3 * pixel + 3), 4 * pixel);
    image.data[4 * pixel + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
