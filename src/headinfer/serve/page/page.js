// Puts the parts of the page together, and asks the server once a second how it is.

import * as api from "./api.js";
import {Conversation} from "./conversation.js";
import {confirmed} from "./dialogs.js";
import {DocumentList} from "./documents.js";
import {byId, hideProblem, setText, showProblem} from "./dom.js";
import {bytes, count, joined, plural} from "./format.js";
import * as history from "./history.js";
import {Memory} from "./memory.js";
import {Passages} from "./passages.js";

const EVERY_MS = 1000;
const LIST_EVERY = 5; // of these, if no document is being read

let model = "";
let current = null; // the conversation that is shown
const conversations = new Map();
const memory = new Memory();
const passages = new Passages();
const documents = new DocumentList({onChoose: choose, onRemove: forget});
const question = byId("question");
const scroller = byId("scroller");

// -- the chosen document ----------------------------------------------------------------------------------------------

function conversationOf(doc) {
  const name = doc?.name ?? "";
  const created = doc?.created ?? 0;
  const known = conversations.get(name);
  if (known && known.created === created) return known;
  const on = {onChange: () => changed(conversation), onGrow: () => grown(conversation), onWhere: showPassage};
  const conversation = new Conversation(name, created, on);
  conversations.set(name, conversation);
  return conversation;
}

function choose(doc) {
  const conversation = conversationOf(doc);
  const title = doc ? doc.filename : "No document";
  setText(byId("ask-title"), title);
  setText(byId("question-label"), doc ? `Question about ${title}` : "Question");
  setText(byId("ask-facts"), doc && doc.of ? plural(doc.of, "token") : "");
  showEmpty(doc);
  if (conversation === current) return;
  current = conversation;
  byId("conversation").replaceChildren(conversation.element);
  scroller.scrollTop = scroller.scrollHeight;
  showControls();
  passages.show(conversation.latestWithPassages, doc).catch(showProblem);
}

const ASK_NOW = {
  ready: "Each question costs only its own tokens. The passages that an answer came from are shown beside it.",
  waiting: "It waits to be read. You can ask now: the answer begins as soon as the document has been read.",
  reading: "It is being read. You can ask now: the answer begins as soon as the document has been read.",
  partial: "The command line has read a part of it. Run headinfer read again to finish it.",
};

function showEmpty(doc) {
  const hasDocuments = documents?.documents.size > 0;
  const [title, text] = doc
    ? [`Ask about ${doc.filename}`, ASK_NOW[doc.state] ?? doc.error]
    : hasDocuments
      ? ["Choose a document", "Or ask the model itself: then it answers from its own knowledge only."]
      : ["Drop a document here", "It is read once and kept. Then ask as often as you like, today or next week."];
  setText(byId("empty-title"), title);
  setText(byId("empty-text"), text);
}

function forget(name) {
  conversations.get(name)?.clear();
  conversations.delete(name);
  history.forget(name);
}

// -- questions and answers --------------------------------------------------------------------------------------------

function showControls() {
  const isRunning = current.running !== null;
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  byId("empty").hidden = current.turns.length > 0;
  byId("clear").hidden = current.turns.length === 0;
}

function changed(conversation) {
  if (conversation !== current) return;
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  showControls();
  if (hadFocus) question.focus();
  scroller.scrollTop = scroller.scrollHeight;
  if (!conversation.running) {
    const turn = conversation.turns.at(-1);
    if (turn?.where?.length) passages.show(turn, chosen()).catch(showProblem);
  }
}

// Follows the answer if its end was in view.
function grown(conversation) {
  if (conversation !== current) return;
  if (scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 120)
    scroller.scrollTop = scroller.scrollHeight;
}

async function showPassage(turn, index) {
  try {
    await passages.show(turn, chosen());
    await passages.open(index);
  } catch (error) {
    showProblem(error);
  }
}

function chosen() {
  return documents.documents.get(current.name) ?? null;
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || !current || current.running) return;
  question.value = "";
  current.ask(model, text, byId("follow").checked);
});

question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("form").requestSubmit();
});

byId("stop").addEventListener("click", () => current.stop());

byId("clear").addEventListener("click", async () => {
  const conversation = current;
  if (!(await confirmed("Clear the history?", "All questions and answers of this document are removed.", "Clear")))
    return;
  conversation.clear();
  showControls();
  passages.show(null, chosen());
  question.focus();
});

byId("problem-close").addEventListener("click", hideProblem);

addEventListener("storage", (event) => {
  if (!event.key?.startsWith(history.PREFIX)) return;
  conversations.get(event.key.slice(history.PREFIX.length))?.reload();
  if (current) showControls();
});

addEventListener("pagehide", () => {
  for (const conversation of conversations.values()) conversation.leave();
});

// -- the server, once a second ----------------------------------------------------------------------------------------

function showConnection(isConnected, text) {
  byId("connection").classList.toggle("is-lost", !isConnected);
  setText(byId("connection"), text);
}

function showState(state) {
  model = state.model;
  setText(byId("model"), joined(state.model, state.context_limit ? `${count(state.context_limit)} tokens` : ""));
  setText(byId("approximation"), state.approximation);
  byId("approximation").hidden = !state.approximation;
  memory.update(state);
  const work = joined(
    state.running ? `${count(state.running)} running` : "",
    state.waiting ? `${count(state.waiting)} waiting` : "",
  );
  showConnection(true, work || "Idle");
}

let ticks = 0;

async function tick() {
  if (!document.hidden) {
    try {
      showState(await api.state());
      if (!documents.isLoaded || documents.hasUnfinished || ticks % LIST_EVERY === 0) await documents.refresh();
      ticks += 1;
    } catch (error) {
      if (!(error instanceof api.ServerError)) console.error(error);
      showConnection(false, error.status ? error.message : "No answer from the server, trying again");
    }
  }
  setTimeout(tick, EVERY_MS);
}

tick();
