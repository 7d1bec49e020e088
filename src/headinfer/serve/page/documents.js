// The list of documents: adding, progress, choosing and removing them.

import * as api from "./api.js";
import {confirmed} from "./dialogs.js";
import {announce, byId, icon, make, setText, showProblem} from "./dom.js";
import {bytes, count, fileSize, joined, left, percent, plural} from "./format.js";
import {local} from "./storage.js";

const CHOSEN = "headinfer.chosen";
const UNFINISHED = ["waiting", "reading"];

// What the page knows about a document, of the server's file object.
function documentOf(file) {
  return {
    ...file.headinfer,
    name: file.id,
    filename: file.filename,
    nbytes: file.bytes,
    created: file.created_at,
    error: file.status === "error" ? file.status_details || "It could not be read." : "",
  };
}

export class DocumentList {
  // onChoose(document or null) is called if another document is chosen, and if the chosen one has changed.
  constructor({onChoose, onRemove}) {
    this.onChoose = onChoose;
    this.onRemove = onRemove;
    this.documents = new Map();
    this.rows = new Map();
    this.isLoaded = false;
    this.refreshing = Promise.resolve();
    this.chosen = local.getItem(CHOSEN) ?? "";
    this.list = byId("document-list");
    this.none = this.addRow("", "No document");
    setText(this.none.facts, "Ask the model itself");
    byId("files").addEventListener("change", (event) => {
      this.addFiles(event.target.files);
      event.target.value = "";
    });
    this.acceptDrops();
  }

  get hasUnfinished() {
    return [...this.documents.values()].some((doc) => UNFINISHED.includes(doc.state));
  }

  // Asks for the list again, and chooses a document if it is named. One request after the other: an old list never
  // replaces a newer one.
  refresh(wanted) {
    const next = this.refreshing.catch(() => {}).then(() => this.refreshNow(wanted));
    this.refreshing = next;
    return next;
  }

  async refreshNow(wanted) {
    const files = await api.files();
    const before = this.documents;
    this.documents = new Map(files.map((file) => [file.id, documentOf(file)]));
    for (const [name, row] of this.rows) {
      if (name && !this.documents.has(name)) {
        row.element.remove();
        this.rows.delete(name);
      }
    }
    // The newest first, after "No document". Rows keep their elements, and so their focus.
    const ordered = [...this.documents.values()].sort((a, b) => b.created - a.created || (a.name < b.name ? -1 : 1));
    let previous = this.none.element;
    for (const doc of ordered) {
      const row = this.rows.get(doc.name) ?? this.addRow(doc.name, doc.filename);
      if (previous.nextElementSibling !== row.element) previous.after(row.element);
      this.update(row, doc, before.get(doc.name));
      previous = row.element;
    }
    this.isLoaded = true;
    const name = wanted ?? this.chosen;
    this.choose(this.documents.has(name) ? name : "");
  }

  choose(name) {
    this.chosen = name;
    local.setItem(CHOSEN, name);
    this.rows.get(name).radio.checked = true;
    this.onChoose(this.documents.get(name) ?? null);
  }

  addRow(name, filename) {
    const radio = make("input", {type: "radio", name: "document", value: name, onchange: () => this.choose(name)});
    const title = make("span", {class: "row-title"}, filename);
    const facts = make("span", {class: "row-facts"});
    const progress = make("progress", {max: "1", "aria-label": `Reading ${filename}`, hidden: ""});
    const remove = name
      ? make(
          "button",
          {
            type: "button",
            class: "icon-button remove",
            "aria-label": `Delete ${filename}`,
            onclick: () => this.remove(name),
          },
          icon("remove"),
        )
      : null;
    const label = make("label", {}, radio, make("span", {class: "row-text"}, title, facts), progress);
    const element = make("li", {class: "row"}, label, remove);
    const row = {element, radio, facts, progress};
    this.rows.set(name, row);
    this.list.append(element);
    return row;
  }

  update(row, doc, before) {
    row.element.dataset.state = doc.state;
    const isUnfinished = UNFINISHED.includes(doc.state);
    row.progress.hidden = !isUnfinished;
    const share = doc.of ? doc.tokens / doc.of : 0;
    row.progress.value = share;
    setText(row.facts, facts(doc, share));
    if (before && before.state !== doc.state) {
      if (doc.state === "ready") announce(`${doc.filename} has been read.`);
      if (doc.state === "failed") announce(`${doc.filename} could not be read. ${doc.error}`);
    }
  }

  async remove(name) {
    const doc = this.documents.get(name);
    const isSure = await confirmed(
      `Delete ${doc.filename}?`,
      "What was read of it is removed from the disk, and its questions and answers from this browser.",
      "Delete",
    );
    if (!isSure) return;
    try {
      await api.removeFile(name);
      this.onRemove(name);
      await this.refresh();
      announce(`${doc.filename} is deleted.`);
      this.rows.get(this.chosen).radio.focus();
    } catch (error) {
      showProblem(error);
    }
  }

  async addFiles(files) {
    // A copy: the browser empties its own list as soon as the event is over.
    for (const file of [...files]) await this.addFile(file);
  }

  async addFile(file) {
    const stopping = new AbortController();
    const status = make("span", {class: "row-facts"}, "Sending");
    const progress = make("progress", {max: "1", value: "0", "aria-label": `Sending ${file.name}`});
    const close = make(
      "button",
      {
        type: "button",
        class: "icon-button",
        "aria-label": `Stop sending ${file.name}`,
        onclick: () => stopping.abort(),
      },
      icon("close"),
    );
    const text = make("span", {class: "row-text"}, make("span", {class: "row-title"}, file.name), status);
    const row = make("li", {class: "row upload"}, make("div", {}, text, progress), close);
    byId("uploads").append(row);
    try {
      const added = await api.upload(
        file,
        (share) => {
          progress.value = share;
          setText(status, joined("Sending", percent(share), fileSize(file.size)));
        },
        stopping.signal,
      );
      row.remove();
      announce(`${file.name} was sent. It is being read.`);
      await this.refresh(added.id);
    } catch (error) {
      if (error.name === "AbortError") {
        row.remove();
        return;
      }
      row.dataset.state = "failed";
      progress.remove();
      setText(status, error.message);
      announce(`${file.name} could not be added. ${error.message}`);
      close.setAttribute("aria-label", `Close the message about ${file.name}`);
      close.addEventListener("click", () => row.remove());
    }
  }

  acceptDrops() {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    let depth = 0;
    const show = () => document.body.classList.toggle("is-dropping", depth > 0);
    document.addEventListener("dragenter", (event) => {
      if (!hasFiles(event)) return;
      depth += 1;
      show();
    });
    document.addEventListener("dragleave", (event) => {
      if (!hasFiles(event)) return;
      depth -= 1;
      show();
    });
    document.addEventListener("dragover", (event) => {
      if (hasFiles(event)) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      show();
      this.addFiles(event.dataTransfer.files);
    });
  }
}

function facts(doc, share) {
  const size = doc.nbytes ? fileSize(doc.nbytes) : "";
  switch (doc.state) {
    case "waiting":
      return joined("Waiting to be read", size);
    case "reading":
      return joined(
        doc.of ? `Reading, ${percent(share)}` : "Reading",
        left(doc.eta_s),
        doc.of ? `${count(doc.tokens)} of ${plural(doc.of, "token")}` : size,
      );
    case "failed":
      return doc.error;
    case "partial":
      return "Read in part by the command line: run headinfer read again to finish it";
    default:
      return joined(
        size,
        plural(doc.of || doc.tokens, "token"),
        doc.disk_bytes ? `${bytes(doc.disk_bytes)} on disk` : "",
        doc.approximation ? "approximate" : "",
      );
  }
}
