/** Asks for the server's token. It is kept in memory only. */

import { byId } from "./elements.js";

/**
 * @param {string} reason Why the last token was not accepted; empty at the first question.
 * @returns {Promise<?string>} The token, or null if the user closed the dialog.
 */
export function askForToken(reason) {
  const dialog = byId("token-dialog");
  const input = byId("token");
  byId("token-reason").textContent = reason;
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const listeners = new AbortController();
    const { signal } = listeners;
    let token = null;
    byId("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      token = input.value.trim();
      if (token) dialog.close();
    }, { signal });
    byId("token-cancel").addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener("close", () => {
      listeners.abort();
      input.value = "";
      resolve(token);
    }, { signal });
  });
}
