// Questions and answers of each document, kept in this browser.

import {local} from "./storage.js";

export const PREFIX = "headinfer.history.";
const MOST = 100;
const SNIPPET = 240;

// A document that was removed and added again under the same name begins without a history.
export function load(name, created) {
  try {
    const kept = JSON.parse(local.getItem(PREFIX + name));
    if (kept && kept.created === created && Array.isArray(kept.turns)) return kept.turns;
  } catch {
    // Not what this page wrote.
  }
  return [];
}

export function save(name, created, turns) {
  let kept = turns.slice(-MOST).map(({question, answer, reasoning, end, facts, error, where}) => ({
    question,
    answer,
    reasoning,
    end,
    facts,
    error,
    where: where?.map((passage) => ({...passage, text: passage.text.slice(0, SNIPPET)})),
  }));
  // If the browser's space is used up, the oldest turns go.
  while (kept.length) {
    try {
      local.setItem(PREFIX + name, JSON.stringify({created, turns: kept}));
      return;
    } catch {
      kept = kept.slice(Math.ceil(kept.length / 4));
    }
  }
  forget(name);
}

export function forget(name) {
  local.removeItem(PREFIX + name);
}
