/** Sends many pictures in few requests: several files each, a few at a time, again when the server is busy. */

import { NoToken, Refusal, Unreachable } from "./server.js";

const FILES_PER_REQUEST = 8;
const BYTES_PER_REQUEST = 4 * 2 ** 20; // so that progress shows on slow connections
const PART_BYTES = 1024; // more than the headers of one part of multipart/form-data, without the file name
const REQUESTS_AT_ONCE = 3;
const ATTEMPTS = 10;
const UNREACHABLE_ATTEMPTS = 4;
const LONGEST_PAUSE_SECONDS = 30;

/**
 * A picture and what became of it.
 *
 * @typedef {object} Picture
 * @property {File} file
 * @property {"waiting"|"classified"|"rejected"|"failed"} state `rejected`: the server cannot read the file. `failed`:
 *   the request did not succeed, so trying again may help.
 * @property {?{name: string, probability: number}[]} classes
 * @property {?string} pixels Base64 of 3,072 bytes.
 * @property {?string} error
 * @property {?object} model
 * @property {?number} seconds Time in the server of the request.
 * @property {number} shared Number of pictures in the request.
 */

export class Queue {
  #server;
  #events;
  #limits = null;
  #waiting = [];
  #active = 0;
  #resumeAt = 0;
  #abort = new AbortController();

  /**
   * @param {import("./server.js").Server} server
   * @param {object} events
   * @param {(picture: Picture) => void} events.onChange A picture has its answer.
   * @param {(seconds: number, reason: string) => void} events.onPause The queue waits before it asks again.
   * @param {() => void} events.onResume A pause has ended.
   * @param {() => void} events.onEnd No picture waits any more.
   */
  constructor(server, events) {
    this.#server = server;
    this.#events = events;
  }

  /** The `limits` of the server's model, or null while they are not known. */
  set limits(limits) {
    this.#limits = limits;
  }

  /** @param {Picture[]} pictures */
  add(pictures) {
    for (const picture of pictures) {
      const problem = this.#problemOf(picture.file);
      if (problem) this.#finish(picture, { state: "rejected", error: problem });
      else this.#waiting.push(picture);
    }
    this.#start();
  }

  /** Drops all pictures that have no answer yet. */
  cancel() {
    this.#waiting = [];
    this.#resumeAt = 0;
    this.#abort.abort();
    this.#abort = new AbortController();
  }

  /** Only a file that does not fit into a request is rejected here: the server would end the connection. */
  #problemOf(file) {
    const most = this.#limits?.max_message_bytes;
    if (!most || file.size <= most) return null;
    return `the file has ${file.size} bytes; this server accepts at most ${most} bytes in a request: save it smaller`;
  }

  #start() {
    while (this.#active < REQUESTS_AT_ONCE && this.#waiting.length) {
      this.#active += 1;
      this.#send(this.#next(), this.#abort.signal).finally(() => {
        this.#active -= 1;
        this.#start();
      });
    }
    if (!this.#active) this.#events.onEnd();
  }

  /** The pictures of the next request: at least one, as many as the limits allow. */
  #next() {
    const count = Math.min(FILES_PER_REQUEST, this.#limits?.max_images ?? FILES_PER_REQUEST);
    const bytes = Math.min(BYTES_PER_REQUEST, this.#limits?.max_message_bytes ?? BYTES_PER_REQUEST);
    let taken = 0;
    let size = 0;
    for (const { file } of this.#waiting.slice(0, count)) {
      size += file.size + 3 * file.name.length + PART_BYTES;
      if (taken && size > bytes) break;
      taken += 1;
    }
    return this.#waiting.splice(0, taken);
  }

  async #send(pictures, signal) {
    for (let attempt = 1; !signal.aborted; attempt += 1) {
      await this.#pauseIsOver(signal);
      if (signal.aborted) return;
      try {
        const answer = await this.#server.classify(pictures.map((picture) => picture.file), signal);
        if (!signal.aborted) this.#distribute(pictures, answer);
        return;
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof Refusal && error.status === 413 && pictures.length > 1) {
          for (const picture of pictures) await this.#send([picture], signal);
          return;
        }
        if (error instanceof NoToken) this.#fail(this.#waiting.splice(0), error); // one refusal is enough
        if (error instanceof Unreachable) {
          const rest = await this.#rejectUnreadable(pictures);
          if (rest.length < pictures.length) return rest.length ? this.#send(rest, signal) : undefined;
        }
        const pause = pauseAfter(error, attempt);
        if (pause === null) return this.#fail(pictures, error);
        this.#pause(pause, error.message);
      }
    }
  }

  #distribute(pictures, { model, seconds, results }) {
    for (const [index, picture] of pictures.entries()) {
      const { classes = null, pixels = null, error } = results[index];
      let state = "classified";
      if (error) state = error.code === "INTERNAL" ? "failed" : "rejected"; // INTERNAL: the file is not at fault
      const shared = pictures.length;
      this.#finish(picture, { state, classes, pixels, error: error?.message ?? null, model, seconds, shared });
    }
  }

  /**
   * A browser also reports a lost connection when a chosen file was deleted or changed.
   *
   * @returns {Promise<Picture[]>} The pictures whose files can be read.
   */
  async #rejectUnreadable(pictures) {
    const readable = await Promise.all(
      pictures.map(({ file }) => file.slice(0, 1).arrayBuffer().then(() => true, () => false)),
    );
    for (const [index, picture] of pictures.entries()) {
      if (readable[index]) continue;
      this.#finish(picture, { state: "rejected", error: "the browser cannot read this file any more: choose it again" });
    }
    return pictures.filter((_, index) => readable[index]);
  }

  #fail(pictures, error) {
    // A file that is too large stays too large; any other request may succeed later.
    const state = error instanceof Refusal && error.status === 413 ? "rejected" : "failed";
    for (const picture of pictures) this.#finish(picture, { state, error: error.message });
  }

  #finish(picture, outcome) {
    Object.assign(picture, outcome);
    this.#events.onChange(picture);
  }

  /** All requests wait: if one of them is refused because the server is busy, the others would be refused too. */
  #pause(seconds, reason) {
    this.#resumeAt = Math.max(this.#resumeAt, performance.now() + 1000 * seconds);
    this.#events.onPause(seconds, reason);
  }

  async #pauseIsOver(signal) {
    let paused = false;
    while (!signal.aborted && performance.now() < this.#resumeAt) {
      paused = true;
      const rest = this.#resumeAt - performance.now();
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, rest);
        signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
      });
    }
    if (paused && !signal.aborted) this.#events.onResume();
  }
}

/** Seconds after which a request may be sent again; null if it must not be. */
function pauseAfter(error, attempt) {
  const growing = Math.min(LONGEST_PAUSE_SECONDS, 2 ** (attempt - 1));
  if (error instanceof Unreachable) return attempt < UNREACHABLE_ATTEMPTS ? growing : null;
  const busy = error instanceof Refusal && (error.status === 429 || error.status === 503);
  if (!busy || attempt >= ATTEMPTS) return null;
  return error.retrySeconds ?? growing;
}
