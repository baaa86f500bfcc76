/** Requests to the server that delivered the page. No other host is ever asked. */

// The server drops a request that it has not answered within this time.
const TIMEOUT_SECONDS = 60;

/** The server refused a request. `results` holds the reasons for single pictures, if it gave any. */
export class Refusal extends Error {
  /**
   * @param {number} status HTTP status.
   * @param {string} message What the server said.
   * @param {?number} retrySeconds Seconds after which the server wants to be asked again; null if it gave none.
   */
  constructor(status, message, retrySeconds) {
    super(message);
    this.status = status;
    this.retrySeconds = retrySeconds;
  }
}

/** The server could not be reached, or the connection was lost. */
export class Unreachable extends Error {}

/** The user closed the question for a token. */
export class NoToken extends Error {}

export class Server {
  #token = null;
  #question = null;
  #askForToken;

  /** @param {(reason: string) => Promise<?string>} askForToken Asks the user; null if the user declined. */
  constructor(askForToken) {
    this.#askForToken = askForToken;
  }

  /** What the server says about its model and its limits. */
  async model() {
    return read((await this.#ask("v1/model", { method: "GET" })).json());
  }

  /** One of the server's own pictures, as a file. */
  async sample(name) {
    const response = await this.#ask(`samples/${encodeURIComponent(name)}`, { method: "GET" });
    const blob = await read(response.blob());
    return new File([blob], name, { type: blob.type });
  }

  /**
   * Classifies pictures in one request.
   *
   * @param {File[]} files At least one.
   * @param {AbortSignal} signal Ends the request.
   * @returns {Promise<{model: object, seconds: ?number, results: object[]}>} One result for each file, in order: its
   *   classes and pixels, or its error. `seconds` is null if the server could read none of them.
   */
  async classify(files, signal) {
    const headers = { "x-request-timeout": String(TIMEOUT_SECONDS) };
    let body = files[0];
    if (files.length === 1) {
      headers["content-type"] = files[0].type || "application/octet-stream";
    } else {
      body = new FormData(); // the browser sets the content type, with the boundary
      for (const file of files) body.append("file", file, file.name);
    }
    const response = await this.#ask("v1/classify?pixels=true", { method: "POST", headers, body, signal }, [422]);
    const answer = await read(response.json());
    if (answer.results?.length !== files.length) {
      throw new Refusal(response.status, answer.detail ?? "The server's answer lacks results.", null);
    }
    return { model: answer.model ?? null, seconds: answer.seconds ?? null, results: answer.results };
  }

  /** One request, repeated with a new token while the server asks for one. */
  async #ask(path, options, accepted = []) {
    for (;;) {
      options.signal?.throwIfAborted();
      const token = this.#token;
      const headers = { ...options.headers, ...(token ? { authorization: `Bearer ${token}` } : {}) };
      const response = await this.#fetch(path, { ...options, headers });
      if (response.ok || accepted.includes(response.status)) return response;
      const refusal = await refusalOf(response);
      if (refusal.status !== 401) throw refusal;
      await this.#renewToken(token, refusal.message);
    }
  }

  async #fetch(path, options) {
    try {
      return await fetch(path, { cache: "no-store", ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("The server does not answer. Check that it runs, then try again.", { cause: error });
    }
  }

  /** Asks for a token, unless another request has got one since `used` was sent. Requests share one question. */
  async #renewToken(used, reason) {
    if (this.#token !== used) return;
    this.#question ??= this.#askForToken(used === null ? "" : reason).finally(() => { this.#question = null; });
    const token = await this.#question;
    if (token === null) throw new NoToken("The server needs a token, and none was given.");
    this.#token = token;
  }
}

/** The body of a response that has begun to arrive. */
async function read(reading) {
  try {
    return await reading;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The connection to the server was lost.", { cause: error });
  }
}

/** The refusal in a response: RFC 9457 problem details if there are any, else the status. */
async function refusalOf(response) {
  let message = "";
  let retrySeconds = secondsOf(response.headers.get("retry-after"));
  if (/json/.test(response.headers.get("content-type") ?? "")) {
    const problem = await response.json().catch(() => ({}));
    message = problem.detail || problem.title || "";
    retrySeconds = problem.retry_after ?? retrySeconds; // the header allows whole seconds only
  }
  message ||= `The server answered with status ${response.status} ${response.statusText}`.trim();
  return new Refusal(response.status, message, retrySeconds);
}

/** The value of a Retry-After header, in seconds: it is a number or a date. */
function secondsOf(value) {
  if (value === null) return null;
  const seconds = Number(value);
  if (Number.isFinite(seconds)) return Math.max(0, seconds);
  const date = Date.parse(value);
  return Number.isNaN(date) ? null : Math.max(0, (date - Date.now()) / 1000);
}
