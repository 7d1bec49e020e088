// The two questions that the page itself asks: whether something is to be removed, and which key the server wants.

import {byId, setText} from "./dom.js";

// Resolves to true if the person confirms.
export function confirmed(title, text, action) {
  const dialog = byId("confirm");
  setText(byId("confirm-title"), title);
  setText(byId("confirm-text"), text);
  setText(byId("confirm-yes"), action);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), {once: true});
  });
}

// Resolves to the key that the person types, or to an empty one, which the server refuses, so that it is asked again.
export function askForKey(wasRefused) {
  const dialog = byId("key");
  const input = byId("key-value");
  setText(
    byId("key-text"),
    wasRefused
      ? "The server refused this key. Type the key that it was started with."
      : "Type the key that the server was started with. It is kept until this tab is closed.",
  );
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(input.value.trim()), {once: true});
  });
}
