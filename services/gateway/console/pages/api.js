// Calls of the gateway. The API key is kept for this tab alone, and sent with every call.

import { forTab } from "./kept.js";

const KEY = "meshserve.key";

export const key = {
  get: () => forTab.get(KEY) ?? "",
  set: (value) => (value ? forTab.set(KEY, value) : forTab.remove(KEY)),
};

/** What the gateway refused or failed at, with the reason that gRPC callers get too. */
export class CallError extends Error {
  constructor(document) {
    super(document.message);
    this.reason = document.reason;
    this.remedy = document.remedy ?? "";
    this.fields = document.fields ?? [];
    this.retryAfterS = document.retry_after_s ?? null;
    this.requestId = document.metadata?.request_id ?? "";
  }
}

const unreachable = () =>
  new CallError({
    reason: "GATEWAY_UNREACHABLE",
    message: "The gateway does not answer.",
    remedy: "Look whether it runs: `meshserve status`.",
  });

const cutOff = () =>
  new CallError({
    reason: "CUT_OFF",
    message: "The stream ended before its answer did.",
    remedy: "Send the request again; what has come so far may not be all.",
  });

async function open(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  if (!response.ok) {
    let document;
    try {
      document = (await response.json()).error;
    } catch {
      throw unreachable();
    }
    throw new CallError(document);
  }
  return response;
}

/** The JSON of an answer. Throws CallError. */
export async function call(path, options) {
  return (await open(path, options)).json();
}

/** The documents of a stream, as they come. Throws CallError, also when the stream is cut off. */
export async function* stream(path, options) {
  const response = await open(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      let chunk;
      try {
        chunk = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw cutOff();
      }
      if (chunk.done) throw cutOff();
      rest += chunk.value;
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const [, event, data] = block.match(/^event: (\w+)\ndata: (.*)$/) ?? [];
        if (event === "message") yield JSON.parse(data);
        if (event === "error") throw new CallError(JSON.parse(data).error);
        if (event === "done") return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const RETRY_MS = [500, 1000, 2000, 5000];

/** Watches a stream for as long as the signal lets it, through restarts of the gateway. */
export async function watch(path, { signal, onDocument, onProblem }) {
  let failures = 0;
  while (!signal.aborted) {
    try {
      for await (const document of stream(path, { signal })) {
        if (failures) onProblem(null);
        failures = 0;
        onDocument(document);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof CallError)) throw error;
      onProblem(error);
      if (["NOT_AN_OPERATOR", "API_KEY_MISSING", "API_KEY_INVALID"].includes(error.reason)) return;
    }
    await new Promise((resume) => setTimeout(resume, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
    failures += 1;
  }
}
