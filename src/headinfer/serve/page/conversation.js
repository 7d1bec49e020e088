// The questions and answers about one document: asking, streaming, stopping, and the history.

import * as api from "./api.js";
import {announce, make, setText} from "./dom.js";
import {count, joined, left, percent, plural, seconds} from "./format.js";
import * as history from "./history.js";
import {showMarkup} from "./markup.js";

const ENDS = {
  length: "The answer has reached its limit of tokens.",
  stopped: "Stopped.",
  cancelled: "The server has stopped this answer.",
  tool_calls: "The model calls a tool, which this page does not have.",
  left: "The page was left before the answer was complete.",
};

export class Conversation {
  // onChange() is called if an answer begins or ends, onGrow() if text is added, and onWhere(turn, index) if the
  // passages of a turn are to be shown; index is null for none in particular.
  constructor(name, created, {onChange, onGrow, onWhere}) {
    this.name = name;
    this.created = created;
    this.on = {onChange, onGrow, onWhere};
    this.turns = history.load(name, created);
    this.running = null;
    this.element = make("ol", {class: "turns"});
    for (const turn of this.turns) this.show(turn);
  }

  get latestWithPassages() {
    return this.turns.findLast((turn) => turn.where?.length) ?? null;
  }

  save() {
    history.save(this.name, this.created, this.turns);
  }

  // Shows what another tab has written, unless an answer is being written here.
  reload() {
    if (this.running) return;
    this.turns = history.load(this.name, this.created);
    this.element.replaceChildren();
    for (const turn of this.turns) this.show(turn);
  }

  clear() {
    this.stop();
    this.turns = [];
    this.element.replaceChildren();
    history.forget(this.name);
  }

  stop() {
    this.running?.stopping.abort();
  }

  // If the page is closed, what was written so far is kept.
  leave() {
    if (!this.running) return;
    this.running.turn.end = "left";
    this.save();
  }

  messages(question, withEarlier) {
    const earlier = withEarlier ? this.turns.filter((turn) => turn.answer && !turn.error) : [];
    return [
      ...earlier.flatMap((turn) => [
        {role: "user", content: turn.question},
        {role: "assistant", content: turn.answer},
      ]),
      {role: "user", content: question},
    ];
  }

  async ask(model, question, withEarlier) {
    const body = {model, messages: this.messages(question, withEarlier)};
    if (this.name) Object.assign(body, {metadata: {session: this.name}, where: true});
    const turn = {question, answer: "", reasoning: "", end: "", facts: "", error: "", where: []};
    this.turns.push(turn);
    this.show(turn);
    this.running = {turn, stopping: new AbortController()};
    this.save();
    this.begin(turn);
    this.on.onChange();
    const began = performance.now();
    try {
      for await (const chunk of api.chat(body, this.running.stopping.signal)) this.take(turn, chunk, began);
    } catch (error) {
      if (error.name === "AbortError") turn.end = "stopped";
      else turn.error = error.message;
    }
    this.running = null;
    this.finish(turn);
    announce(joined(turn.answer, ENDS[turn.end], turn.error));
    if (this.turns.includes(turn)) this.save();
    this.on.onChange();
  }

  take(turn, chunk, began) {
    if (chunk.queue) setText(turn.view.progressText, waiting(chunk.queue.position));
    if (chunk.prefill) this.showPrefill(turn, chunk.prefill);
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const reasoning = delta.reasoning_content;
    if (reasoning) {
      turn.reasoning += reasoning;
      turn.view.reasoning.hidden = false;
      turn.view.reasoningText.append(reasoning);
    }
    if (delta.content) {
      turn.answer += delta.content;
      this.draw(turn);
    }
    if (reasoning || delta.content) {
      turn.view.progress.hidden = true;
      this.on.onGrow();
    }
    if (choice?.finish_reason) turn.end = choice.finish_reason;
    if (chunk.where) turn.where = chunk.where;
    if (chunk.where_unavailable) turn.error = `Where the answer came from cannot be told: ${chunk.where_unavailable}`;
    if (chunk.usage) turn.facts = usage(chunk.usage, (performance.now() - began) / 1000);
  }

  // Draws the answer once before the next frame, however many tokens come until then.
  draw(turn) {
    if (turn.view.isDrawn) return;
    turn.view.isDrawn = true;
    requestAnimationFrame(() => {
      turn.view.isDrawn = false;
      showMarkup(turn.view.answer, turn.answer);
      this.on.onGrow();
    });
  }

  showPrefill(turn, {tokens, of, eta_s: eta}) {
    const {bar, progressText} = turn.view;
    const share = of ? tokens / of : 0;
    bar.value = share;
    setText(progressText, joined(`Reading ${count(tokens)} of ${plural(of, "token")}`, left(eta)));
    const quarter = Math.floor(share * 4);
    if (quarter > turn.view.quarter) announce(joined(`${percent(quarter / 4)} has been read`, left(eta)));
    turn.view.quarter = quarter;
  }

  begin(turn) {
    turn.view.element.setAttribute("aria-busy", "true");
    turn.view.progress.hidden = false;
    turn.view.quarter = 0;
    announce("The question is sent.");
  }

  // A turn with all that is known about it. Its view has the elements that change while the answer is written.
  show(turn) {
    const answer = make("div", {class: "answer"});
    const reasoningText = make("div", {class: "reasoning-text"}, turn.reasoning);
    const reasoning = make("details", {class: "reasoning"}, make("summary", {}, "Reasoning"), reasoningText);
    reasoning.hidden = !turn.reasoning;
    const bar = make("progress", {max: "1", "aria-label": "Progress of reading"});
    const progressText = make("span", {}, "Waiting for the server");
    const progress = make("div", {class: "turn-progress"}, bar, progressText);
    progress.hidden = true;
    const error = make("p", {class: "turn-error"});
    const facts = make("p", {class: "turn-facts"});
    const sources = make("div", {class: "sources"});
    const question = make("h3", {class: "question"}, turn.question);
    const element = make("li", {class: "turn"}, question, reasoning, answer, progress, error, sources, facts);
    turn.view = {
      element,
      answer,
      reasoning,
      reasoningText,
      progress,
      bar,
      progressText,
      error,
      facts,
      sources,
      quarter: 0,
    };
    this.element.append(element);
    if (turn !== this.running?.turn) this.finish(turn);
  }

  finish(turn) {
    const {element, answer, progress, error, facts, sources} = turn.view;
    showMarkup(answer, turn.answer);
    element.removeAttribute("aria-busy");
    progress.hidden = true;
    setText(error, turn.error);
    error.hidden = !turn.error;
    setText(facts, joined(ENDS[turn.end], turn.facts));
    facts.hidden = !facts.textContent;
    sources.replaceChildren();
    sources.hidden = !turn.where?.length;
    if (sources.hidden) return;
    sources.append(make("span", {class: "quiet"}, "From"));
    turn.where.forEach((passage, index) => {
      sources.append(
        make(
          "button",
          {type: "button", class: "source", onclick: () => this.on.onWhere(turn, index)},
          make("span", {class: "unseen"}, "Passage "),
          make("b", {}, `${index + 1}`),
          " ",
          percent(passage.share),
        ),
      );
    });
  }
}

function waiting(before) {
  return before ? `Waiting for ${plural(before, "other request")}` : "Waiting for the server";
}

function usage({prompt_tokens: prompt, completion_tokens: completion, prompt_tokens_details: details}, duration) {
  const cached = details?.cached_tokens ?? 0;
  return joined(
    `${plural(completion, "token")} in ${seconds(duration)}`,
    prompt ? `${count(cached)} of ${plural(prompt, "prompt token")} ${cached === 1 ? "was" : "were"} read before` : "",
  );
}
