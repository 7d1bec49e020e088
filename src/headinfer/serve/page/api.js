// Talks to the server: requests with the key, errors as the server's sentences, uploads and streams.

import {askForKey} from "./dialogs.js";
import {session} from "./storage.js";

const KEY = "headinfer.key";
const UNREACHABLE = "The server does not answer. Check that it is running.";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let keyIsComing = null;

// Asks for a key once for all requests that were refused with the same key.
async function newKey(refused) {
  if (session.getItem(KEY) !== refused) return;
  keyIsComing ??= askForKey(refused !== null);
  const key = await keyIsComing;
  keyIsComing = null;
  session.setItem(KEY, key);
}

function sentence(status, body) {
  try {
    const message = JSON.parse(body).error.message;
    if (typeof message === "string" && message) return message;
  } catch {
    // Not an error of the server but of something before it, such as a proxy.
  }
  return `The server answers with the status ${status}.`;
}

// A response, or a ServerError with the server's sentence.
async function request(path, options = {}) {
  for (;;) {
    const key = session.getItem(KEY);
    const headers = new Headers(options.headers);
    if (key !== null) headers.set("Authorization", `Bearer ${key}`);
    let response;
    try {
      response = await fetch(path, {...options, headers});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(UNREACHABLE, 0);
    }
    if (response.ok) return response;
    if (response.status !== 401)
      throw new ServerError(sentence(response.status, await response.text()), response.status);
    await newKey(key);
  }
}

async function json(path, options) {
  return (await request(path, options)).json();
}

const file = (name) => `/v1/files/${encodeURIComponent(name)}`;

export const models = () => json("/v1/models");
export const state = () => json("/v1/state");
export const files = async () => (await json("/v1/files")).data;
export const removeFile = (name) => json(file(name), {method: "DELETE"});

// Characters of a document. The range counts Unicode characters, as Python does, not the 16-bit units of JavaScript.
export async function content(name, start, stop) {
  const range = stop === undefined ? "" : `?start=${start}&stop=${stop}`;
  const response = await request(`${file(name)}/content${range}`);
  // text() would drop a byte order mark, which is a character of the document too.
  return Array.from(new TextDecoder("utf-8", {ignoreBOM: true}).decode(await response.arrayBuffer()));
}

// Sends a file. fetch() does not tell how much has been sent, XMLHttpRequest does.
export async function upload(data, onProgress, signal) {
  for (;;) {
    const key = session.getItem(KEY);
    const reply = await sent(data, key, onProgress, signal);
    if (reply.status === 200) return JSON.parse(reply.responseText);
    if (reply.status !== 401) throw new ServerError(sentence(reply.status, reply.responseText), reply.status);
    await newKey(key);
  }
}

function sent(data, key, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", data, data.name);
    const exchange = new XMLHttpRequest();
    exchange.open("POST", "/v1/files");
    if (key !== null) exchange.setRequestHeader("Authorization", `Bearer ${key}`);
    exchange.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    exchange.onload = () => resolve(exchange);
    exchange.onerror = () => reject(new ServerError(UNREACHABLE, 0));
    exchange.onabort = () => reject(new DOMException("The upload was stopped.", "AbortError"));
    signal.addEventListener("abort", () => exchange.abort());
    exchange.send(form);
  });
}

// The chunks of a streamed chat completion.
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: {"Content-Type": "application/json"},
    body: JSON.stringify({...body, stream: true, stream_options: {include_usage: true}}),
    signal,
  });
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data:")) continue; // a comment, which keeps the connection alive
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, 0);
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer was complete.", 0);
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server broke before the answer was complete.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
