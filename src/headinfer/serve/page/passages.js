// Where an answer came from: the document as a strip along its length, and its passages, to be read in place.

import * as api from "./api.js";
import {byId, icon, make, setText} from "./dom.js";
import {count, joined, percent} from "./format.js";

const AROUND = 800; // characters that are shown before and after a passage
const MORE = 3000; // characters that are added by "Earlier" and "Later"

export class Passages {
  constructor() {
    this.turn = undefined; // nothing is shown yet
    this.cards = [];
  }

  // Shows the passages of a turn about a document; a turn of null shows what this part of the page is for.
  async show(turn, doc) {
    if (turn === this.turn && doc?.name === this.doc?.name) return;
    if (!doc) turn = null;
    this.turn = turn;
    this.doc = doc;
    this.cards = [];
    byId("strip").replaceChildren();
    byId("passages").replaceChildren();
    byId("where-body").hidden = !turn;
    if (!turn) {
      setText(
        byId("where-text"),
        doc
          ? "Ask a question: the passages that the answer came from are shown here, along the length of the document."
          : "Choose a document and ask: the passages that the answer came from are shown here.",
      );
      return;
    }
    setText(byId("where-text"), `“${turn.question}”`);
    const length = doc.characters || (await api.content(doc.name)).length;
    if (turn !== this.turn) return;
    doc.characters = length;
    turn.where.forEach((passage, index) => this.add(passage, index));
  }

  add(passage, index) {
    const where = this.turn.where;
    const length = this.doc.characters;
    const most = Math.max(...where.map((other) => other.share));
    const at = percent(passage.start / length);
    const band = make("button", {
      type: "button",
      class: "band",
      "aria-label": `Passage ${index + 1}, ${percent(passage.share)}, at ${at} of the document`,
      title: `${index + 1}: ${percent(passage.share)}`,
      onclick: () => this.open(index),
    });
    band.style.setProperty("--from", `${(100 * passage.start) / length}%`);
    band.style.setProperty("--length", `${(100 * (passage.stop - passage.start)) / length}%`);
    band.style.setProperty("--order", `${where.length - index}`);
    band.style.setProperty("--heat", `${Math.max(0.3, Math.sqrt(passage.share / most))}`);
    byId("strip").append(band);

    const id = `passage-${index}`;
    const bar = make("span", {class: "share-bar", "aria-hidden": "true"});
    bar.style.setProperty("--share", `${passage.share / most}`);
    const head = make(
      "button",
      {
        type: "button",
        class: "passage-head",
        "aria-expanded": "false",
        "aria-controls": id,
        onclick: () => this.toggle(index),
      },
      make("span", {class: "passage-number"}, `${index + 1}`),
      make("span", {class: "passage-share"}, percent(passage.share)),
      make("span", {class: "passage-place"}, joined(passage.file || this.doc.filename, `${at} in`)),
      icon("open"),
      bar,
    );
    const snippet = make("p", {class: "snippet"}, snippetOf(passage));
    const reader = make("div", {class: "reader", id, hidden: ""});
    const element = make("li", {class: "passage"}, head, snippet, reader);
    // Passages of an answer are numbered by their share, and listed in this order.
    byId("passages").append(element);
    this.cards.push({passage, band, head, snippet, reader, element, isLoaded: false});
    const mark = (isOn) => () => {
      band.classList.toggle("is-marked", isOn);
      element.classList.toggle("is-marked", isOn);
    };
    for (const part of [band, head]) {
      part.addEventListener("pointerenter", mark(true));
      part.addEventListener("pointerleave", mark(false));
      part.addEventListener("focus", mark(true));
      part.addEventListener("blur", mark(false));
    }
  }

  toggle(index) {
    if (this.cards[index].reader.hidden) this.open(index);
    else this.close(this.cards[index]);
  }

  close(card) {
    card.reader.hidden = true;
    card.snippet.hidden = false;
    card.head.setAttribute("aria-expanded", "false");
    card.band.classList.remove("is-open");
  }

  async open(index) {
    const card = this.cards[index];
    if (!card) return;
    for (const other of this.cards) if (other !== card) this.close(other);
    card.reader.hidden = false;
    card.snippet.hidden = true;
    card.head.setAttribute("aria-expanded", "true");
    card.band.classList.add("is-open");
    card.head.focus({preventScroll: true});
    if (!card.isLoaded) await this.load(card, index);
    card.element.scrollIntoView({block: "nearest"});
  }

  // The passage with the text around it. Its characters are those of Python, so ranges are cut from arrays of them.
  async load(card, index) {
    const {passage, reader} = card;
    const name = this.doc.name;
    const length = this.doc.characters;
    let from = Math.max(0, passage.start - AROUND);
    let to = Math.min(length, passage.stop + AROUND);
    let text;
    try {
      text = await api.content(name, from, to);
    } catch (error) {
      reader.replaceChildren(make("p", {class: "turn-error", role: "alert"}, error.message));
      return;
    }
    card.isLoaded = true;
    const cut = (start, stop) => text.slice(start - from, stop - from).join("");
    const before = make("span", {}, cut(from, passage.start));
    const marked = make("mark", {}, cut(passage.start, passage.stop));
    const after = make("span", {}, cut(passage.stop, to));
    const page = make(
      "div",
      {class: "reader-text", tabindex: "0", role: "region", "aria-label": `Text around passage ${index + 1}`},
      before,
      marked,
      after,
    );
    const earlier = make("button", {type: "button", class: "plain"}, "Earlier");
    const later = make("button", {type: "button", class: "plain"}, "Later");
    const place = make("span", {class: "quiet"});
    const update = () => {
      earlier.disabled = from === 0;
      later.disabled = to === length;
      setText(place, `Characters ${count(from)} to ${count(to)}`);
    };
    earlier.addEventListener("click", async () => {
      const start = Math.max(0, from - MORE);
      const height = page.scrollHeight;
      before.prepend((await api.content(name, start, from)).join(""));
      from = start;
      page.scrollTop += page.scrollHeight - height;
      update();
    });
    later.addEventListener("click", async () => {
      const stop = Math.min(length, to + MORE);
      after.append((await api.content(name, to, stop)).join(""));
      to = stop;
      update();
    });
    update();
    reader.replaceChildren(page, make("div", {class: "reader-foot"}, earlier, later, place));
    page.scrollTop = Math.max(0, marked.offsetTop - 48);
  }
}

// The beginning of a passage, without the part of a word that it may begin with.
function snippetOf({start, text}) {
  return start === 0 ? text.trim() : text.replace(/^\S*\s+/, "… ").trim();
}
