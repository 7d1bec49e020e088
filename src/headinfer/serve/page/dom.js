// Makes elements. Text reaches the page only as text nodes, so no text of a document or an answer becomes markup.

const SVG = document.querySelector("svg").namespaceURI;

export const byId = (id) => document.getElementById(id);

// make("button", {class: "plain", type: "button", onclick: f}, "Text", child): an attribute that is false or null is
// left out, and a function is a listener.
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function makeSvg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function icon(name) {
  return makeSvg("svg", {"aria-hidden": "true"}, makeSvg("use", {href: `#icon-${name}`}));
}

// Sets a text only if it differs, so that a screen reader does not read it again.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function announce(text) {
  setText(byId("announce"), text);
}

export function showProblem(error) {
  setText(byId("problem-text"), error.message);
  byId("problem").hidden = false;
}

export function hideProblem() {
  byId("problem").hidden = true;
  setText(byId("problem-text"), "");
}
